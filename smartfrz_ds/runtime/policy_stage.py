"""A freezing stage: the policy judges on rank 0, all ranks hear the same decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.model.view import View, layer_infos
from smartfrz_ds.policies import SHARED_SETTINGS, make_policy
from smartfrz_ds.policies.base import ChecksStart, Decision, Policy

from .intervals import resolve


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks have heard. chosen: layers to freeze now; failure: why the policy could not decide, empty where it could (the
    text is rank 0's; the others have one of their own); probabilities: of judged layers, in [0, 1]; reasons: rank 0's, else empty."""

    chosen: frozenset[str] = frozenset()
    failure: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def build_policy(config: FreezeConfig, layers: Sequence[Layer], total_steps: int | None) -> Policy:
    """The configured policy, new. Raises ValueError for what it refuses, the length of the run among it (steps, None: unknown)."""
    settings = dict(resolve(config, total_steps, provisional=config.policy == "manual").policy) | {
        key: getattr(config, key) for key in SHARED_SETTINGS.get(config.policy, ())
    }
    policy = make_policy(config.policy, settings)
    if isinstance(policy, ChecksStart):
        policy.check_start(total_steps, layer_infos(layers))
    return policy


def decide(
    policy: Policy, look: Callable[[], View], allow: Callable[[Sequence[str]], frozenset[str]], *, step: int
) -> tuple[Decision, frozenset[str], str]:
    """What a policy wants, what of it the rules `allow`, and why it failed; a policy that fails freezes nothing.

    look: makes the view, within the same safety: the other ranks wait for an answer.
    """
    try:
        view = look()
        decision = policy.decide(view)
        unknown = set(decision.freeze) - set(view.candidates)
        if unknown:
            raise ValueError(f"it named {sorted(unknown)}, which are not candidates")
        return decision, allow(decision.freeze), ""
    except Exception as error:
        return Decision(), frozenset(), f"policy {policy.name!r} failed at step {step}, nothing was frozen: {error}"


def broadcast_decision(ranks: Collectives, names: Sequence[str], own: tuple[Decision, frozenset[str], str], about: str) -> Verdict:
    """Broadcast rank 0's outcome of `decide`, and see that every rank has heard the same. Collective.

    names: all layers. own: only rank 0's counts. about: step and frozen set, compared too.

    Raises:
        RanksDisagree: on all ranks.
    """
    decision, chosen, failure = own
    flags = [float(bool(failure))] + [float(name in chosen) for name in names]
    told = ranks.broadcast([*flags, *(decision.probabilities.get(name, float("nan")) for name in names)])
    heard = frozenset(name for name, flag in zip(names, told[1 : 1 + len(names)], strict=True) if flag)
    ranks.assert_same(f"{about}, decision {sorted(heard)}", "freezing decisions")
    known: dict[str, Any] = {n: p for n, p in zip(names, told[1 + len(names) :], strict=True) if p == p}
    told_failure = (failure or "rank 0: the policy failed; nothing was frozen") if told[0] else ""
    return Verdict(chosen=heard, failure=told_failure, probabilities=known, reasons=dict(decision.reasons))
