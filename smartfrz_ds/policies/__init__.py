"""Policies, which decide what to freeze: one file per policy behind one small interface (base.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from smartfrz_ds.model.view import LayerInfo, Need, View, Window

from .attention import AttentionPolicy
from .autofreeze import AutoFreezePolicy
from .base import ChecksStart, Decision, Policy, SetsLr
from .by_step.freezeout import FreezeOutPolicy
from .by_step.linear import LinearPolicy
from .by_step.one_shot import LatePolicy
from .by_step.random_layers import RandomPolicy
from .egeria import EgeriaPolicy
from .manual import ManualPolicy
from .pipetransformer import PipeTransformerPolicy
from .weight_drift import WeightDriftPolicy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        AttentionPolicy,
        LinearPolicy,
        LatePolicy,
        RandomPolicy,
        FreezeOutPolicy,
        AutoFreezePolicy,
        EgeriaPolicy,
        PipeTransformerPolicy,
        WeightDriftPolicy,
        ManualPolicy,
    )
}

# Settings of the whole run that a policy takes in addition to those of its own section.
SHARED_SETTINGS: dict[str, tuple[str, ...]] = {
    "attention": ("max_frozen_fraction",),
    "linear": ("max_frozen_fraction",),
    "random": ("max_frozen_fraction", "order"),
}

# What to do if the run cannot provide what a policy needs.
_REMEDIES: dict[Need, str] = {
    "weights": "weights, which cannot be sampled here",
    "gradients": "gradients, which this engine cannot provide exactly",
    "activations": "a probe batch; allowed: an integer >= 2 at smartfrz.probe, and probe_batch=… of smartfrz_ds.initialize or attach",
    "total_steps": "the length of the run, which is unknown; allowed: an integer at smartfrz.total_steps",
    "lr_scale": "separate parameter groups for each layer",
}


def make_policy(name: str, settings: Mapping[str, Any]) -> Policy:
    """Create a policy.

    Args:
        name: A key of `POLICIES`.
        settings: The policy's settings, passed as keyword arguments.

    Raises:
        ValueError: The name is not in `POLICIES`, or the policy refuses a setting.
    """
    if name not in POLICIES:
        raise ValueError(f"smartfrz.policy: got {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name](**settings)


def check_needs(policy: Policy, given: Collection[Need], why: Mapping[Need, str] | None = None) -> None:
    """Refuse, at start, a policy that needs something the run cannot provide.

    Args:
        policy: The policy to check.
        given: What the run can provide.
        why: Explanations that replace the general ones, by missing need.

    Raises:
        ValueError: Names the policy and what is missing.
    """
    for need in sorted(policy.needs - set(given)):
        raise ValueError(f"smartfrz.policy: {policy.name!r} needs {(why or {}).get(need, _REMEDIES[need])}")


__all__ = [
    "POLICIES",
    "SHARED_SETTINGS",
    "AttentionPolicy",
    "AutoFreezePolicy",
    "ChecksStart",
    "Decision",
    "EgeriaPolicy",
    "FreezeOutPolicy",
    "LatePolicy",
    "LayerInfo",
    "LinearPolicy",
    "ManualPolicy",
    "Need",
    "PipeTransformerPolicy",
    "Policy",
    "RandomPolicy",
    "SetsLr",
    "View",
    "WeightDriftPolicy",
    "Window",
    "check_needs",
    "make_policy",
]
