"""FLOPs of a step for any set of active layers: the one count used by budget, report, planner and benchmarks."""

from .meter import FlopMeter
from .profile import FlopProfile, FlopTally, Gradient, StepCost, chain_profile, estimate_profile, saved_fraction, step_flops

__all__ = [
    "FlopMeter",
    "FlopProfile",
    "FlopTally",
    "Gradient",
    "StepCost",
    "chain_profile",
    "estimate_profile",
    "saved_fraction",
    "step_flops",
]
