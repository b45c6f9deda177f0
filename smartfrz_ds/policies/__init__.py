"""Policies, which decide what to freeze: one file per policy behind one small interface (base.py)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from smartfrz_ds.config.own import PolicyObject
from smartfrz_ds.model.view import LayerInfo, Need, View, Window

from .attention import AttentionPolicy
from .autofreeze import AutoFreezePolicy
from .base import ChangesAtSteps, ChecksStart, Decision, Policy, SetsLr
from .by_step.band import BandPolicy
from .by_step.freezeout import FreezeOutPolicy
from .by_step.linear import LinearPolicy
from .by_step.one_shot import LatePolicy
from .by_step.random_layers import RandomPolicy
from .by_step.schedule import ManualPolicy, SchedulePolicy
from .egeria import EgeriaPolicy
from .own import check_policy, make_own, own_class
from .pipetransformer import PipeTransformerPolicy
from .weight_drift import WeightDriftPolicy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        AttentionPolicy,
        LinearPolicy,
        LatePolicy,
        BandPolicy,
        RandomPolicy,
        FreezeOutPolicy,
        AutoFreezePolicy,
        EgeriaPolicy,
        PipeTransformerPolicy,
        WeightDriftPolicy,
        SchedulePolicy,
        ManualPolicy,
    )
}

# Settings of the whole run that a policy takes in addition to those of its own section.
SHARED_SETTINGS: dict[str, tuple[str, ...]] = {
    "attention": ("max_frozen_fraction",),
    "linear": ("max_frozen_fraction", "order"),
    "band": ("max_frozen_fraction",),
    "random": ("max_frozen_fraction", "order"),
    "schedule": ("order",),
}

# These name layers from the front only: from the back they would never freeze anything.
_FRONT_ONLY = ("attention", "freezeout", "autofreeze", "egeria", "pipetransformer")

# What to do if the run cannot provide what a policy needs.
_REMEDIES: dict[Need, str] = {
    "weights": "weights, which cannot be sampled here",
    "gradients": "gradients, which this engine cannot provide exactly",
    "activations": "a probe batch; allowed: an integer >= 2 at smartfrz.probe, and probe_batch=… of smartfrz_ds.initialize or attach",
    "total_steps": "the length of the run, which is unknown; allowed: an integer at smartfrz.total_steps",
    "lr_scale": "separate parameter groups for each layer",
}


def check_order_of(name: str, order: str) -> None:
    """Refuse an order in which a policy would freeze nothing, or only a part.

    Raises:
        ValueError: Names the order, the policy, and what is allowed.
    """
    if order == "back_to_front" and name in _FRONT_ONLY:
        raise ValueError(f"smartfrz.order: got 'back_to_front'; allowed with policy {name!r}: 'front_to_back', 'any'")
    if order != "any" and name == "band":  # the back freezes while layers in front of it train
        raise ValueError(f"smartfrz.order: got {order!r}; allowed with policy 'band': 'any'")


def make_policy(name: str, settings: Mapping[str, Any], given: PolicyObject | None = None) -> Policy:
    """Create a policy, or reset the one that the script passed.

    Args:
        name: A key of `POLICIES`, 'package.module:Class', or the name of an installed package's policy.
        settings: The policy's settings, passed as keyword arguments.
        given: The policy as an object.

    Raises:
        ValueError: There is no such policy, or it refuses a setting.
    """
    if given is not None:
        check_policy(given.policy, name, POLICIES)
        given.policy.load_state_dict(json.loads(given.initial))
        return given.policy
    if name not in POLICIES:
        return make_own(name, settings, POLICIES)
    return POLICIES[name](**settings)


def policy_class(name: str, given: PolicyObject | None = None) -> type[Any]:
    """Return the class of a policy, imported if necessary.

    Args:
        name: As in `make_policy`.
        given: As in `make_policy`.

    Raises:
        ValueError: It cannot be imported, or lacks a method.
    """
    if given is not None:
        return type(given.policy)
    return POLICIES[name] if name in POLICIES else own_class(name, POLICIES)


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
    "BandPolicy",
    "ChangesAtSteps",
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
    "SchedulePolicy",
    "SetsLr",
    "View",
    "WeightDriftPolicy",
    "Window",
    "check_needs",
    "make_policy",
    "policy_class",
]
