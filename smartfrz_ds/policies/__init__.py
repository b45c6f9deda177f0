"""Who decides: one file a policy, one small interface (base.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .attention import AttentionPolicy
from .base import Decision, LayerInfo, Policy, View, Window
from .linear import LinearPolicy
from .manual import ManualPolicy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (AttentionPolicy, LinearPolicy, ManualPolicy)}


def make_policy(name: str, settings: Mapping[str, Any]) -> Policy:
    """The policy of this name with its settings as keyword arguments.

    Raises ValueError for a name that isn't in POLICIES and for whatever the policy refuses.
    """
    if name not in POLICIES:
        raise ValueError(f"smartfrz.policy: got {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name](**settings)


__all__ = [
    "POLICIES",
    "AttentionPolicy",
    "Decision",
    "LayerInfo",
    "LinearPolicy",
    "ManualPolicy",
    "Policy",
    "View",
    "Window",
    "make_policy",
]
