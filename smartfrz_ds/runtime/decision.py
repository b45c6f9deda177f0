"""One decision of a policy: made on rank 0, received by every rank, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.view import View
from smartfrz_ds.policies.base import Decision, Policy


@dataclass(frozen=True, kw_only=True)
class StageDecision:
    """The decision of one freezing stage, as every rank received it.

    Attributes:
        chosen: Layers to freeze now.
        thawed: Layers to thaw now.
        failure: Why the policy could not decide, "" if it could. Ranks other than 0 have a general text.
        probabilities: Probability of each judged layer, in [0, 1].
        reasons: Reasons by layer, on rank 0 only.
    """

    chosen: frozenset[str] = frozenset()
    thawed: frozenset[str] = frozenset()
    failure: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def decide(
    policy: Policy, look: Callable[[], View], allow: Callable[[Decision], frozenset[str]], *, step: int
) -> tuple[Decision, frozenset[str], str]:
    """Let a policy decide. A policy that fails freezes nothing.

    Args:
        policy: The policy.
        look: Creates the view. Its errors are caught too, as the other ranks wait for an answer.
        allow: Applies the rules: returns those of the named layers that may freeze, and raises ValueError for a thaw that they forbid.
        step: The current step, for the message.

    Returns:
        The decision, the layers to freeze, and why the policy failed ("" if it did not).
    """
    try:
        view = look()
        decision = policy.decide(view)
        _check(decision, view)
        return decision, allow(decision), ""
    except Exception as error:
        return Decision(), frozenset(), f"policy {policy.name!r} failed at step {step}, nothing was frozen: {error}"


def _check(decision: object, view: View) -> None:
    """Check a decision before rank 0 broadcasts it: an error later would leave the other ranks waiting.

    Raises:
        ValueError, TypeError: It is not a decision about this view.
    """
    if not isinstance(decision, Decision):
        raise TypeError(f"decide returned a {type(decision).__name__}; needed: a Decision")
    if isinstance(decision.freeze, str):
        raise TypeError(f"Decision.freeze is the text {decision.freeze!r}; needed: a tuple of names")
    if unknown := set(decision.freeze) - set(view.candidates):
        raise ValueError(f"it named {sorted(map(str, unknown))}, which are not candidates")
    if isinstance(decision.thaw, str):
        raise TypeError(f"Decision.thaw is the text {decision.thaw!r}; needed: a tuple of names")
    if unknown := set(decision.thaw) - {*view.frozen, *view.user_frozen}:
        raise ValueError(f"it thaws {sorted(map(str, unknown))}, which are not frozen")
    names = {layer.name for layer in view.layers}
    for name, p in decision.probabilities.items():
        if name not in names or not isinstance(p, float | int) or not (0 <= p <= 1 or p != p):
            raise ValueError(f"it gave the probability {p!r} for {name!r}; needed: a layer's name and a number in [0, 1]")
    for name, reason in decision.reasons.items():
        if not isinstance(name, str) or not isinstance(reason, str):
            raise TypeError(f"it gave the reason {reason!r} for {name!r}; needed: a layer's name and a text")
    if not isinstance(decision.note, str):
        raise TypeError(f"its note is {decision.note!r}; needed: a text")


def broadcast_decision(ranks: Collectives, names: Sequence[str], own: tuple[Decision, frozenset[str], str], about: str) -> StageDecision:
    """Broadcast rank 0's result of `decide`, and check that every rank received the same. Collective.

    Args:
        ranks: The collectives of all ranks.
        names: Names of all layers.
        own: Result of `decide`; only rank 0's is used.
        about: Step and frozen set, which are compared too.

    Raises:
        RanksDisagree: The ranks differ. Raised on all ranks.
    """
    decision, chosen, failure = own
    flags = [float(bool(failure))] + [float((name in chosen) + 2 * (name in decision.thaw)) for name in names]
    told = ranks.broadcast([*flags, *(decision.probabilities.get(name, float("nan")) for name in names)])
    heard, back = (frozenset(name for name, x in zip(names, told[1 : 1 + len(names)], strict=True) if x == flag) for flag in (1.0, 2.0))
    ranks.assert_same(f"{about}, decision {sorted(heard)}" + (f", thaw {sorted(back)}" if back else ""), "freezing decisions")
    known: dict[str, Any] = {n: p for n, p in zip(names, told[1 + len(names) :], strict=True) if p == p}
    told_failure = (failure or "rank 0: the policy failed; nothing was frozen") if told[0] else ""
    return StageDecision(chosen=heard, thawed=back, failure=told_failure, probabilities=known, reasons=dict(decision.reasons))
