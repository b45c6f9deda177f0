"""Predict what a step costs on a cluster: pipeline schedules simulated, the best cut, the saving of a freeze plan.

Pure arithmetic on measured or estimated layer costs: no engine, no tensors, no communication, and the same result on
every rank.
"""

from .cached import CachedPhase, CacheUse, cached_phase
from .costs import Cluster, LayerCost, Link, Tied, Traffic, estimate_costs, load_costs
from .cut import DoesNotFit, best_cut
from .plan import Phase, PhasePlan, Plan, Step, freeze_plan
from .simulate import Deadlock, Instruction, Timeline, instructions, replay, simulate, stage_times
from .width import Width, better_width

__all__ = [
    "CacheUse",
    "CachedPhase",
    "Cluster",
    "Deadlock",
    "DoesNotFit",
    "Instruction",
    "LayerCost",
    "Link",
    "Phase",
    "PhasePlan",
    "Plan",
    "Step",
    "Tied",
    "Timeline",
    "Traffic",
    "Width",
    "best_cut",
    "better_width",
    "cached_phase",
    "estimate_costs",
    "freeze_plan",
    "instructions",
    "load_costs",
    "replay",
    "simulate",
    "stage_times",
]
