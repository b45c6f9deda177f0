"""The outcome of a run in one sentence, what it froze or why it froze nothing: at its end, in `report()` and on the report page."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .events import FreezeEvent
from .words import layer_names, some


@dataclass
class Stages:
    """The policy's decisions at the freezing stages so far, condensed.

    Attributes:
        seen: Stages at which the policy was asked.
        failed: Stages at which it raised.
        layer: The most certain layer of all that did not freeze; "" where no layer was judged with a probability.
        probability: That layer's probability, in [0, 1].
        step: The step of that judgement.
        reason: The policy's reason.
        front: The least certain layer in front of it at that step, if a layer freezes only together with those in front of it.
        front_probability: The probability of `front`, in [0, 1].
        last: The newest reasons, by layer, if the policy gave no probabilities. A few at most.
    """

    seen: int = 0
    failed: int = 0
    layer: str = ""
    probability: float = 0.0
    step: int = 0
    reason: str = ""
    front: str = ""
    front_probability: float = 0.0
    last: dict[str, str] = field(default_factory=dict)

    def judged(
        self,
        step: int,
        chosen: Collection[str],
        probabilities: Mapping[str, float],
        reasons: Mapping[str, str],
        *,
        failed: bool = False,
        ordered: bool = True,
    ) -> None:
        """Count a freezing stage at which the policy was asked.

        Args:
            step: Step of the stage.
            chosen: Layers that freeze now.
            probabilities: Probability of each judged layer, front to back.
            reasons: The policy's reasons, by layer.
            failed: Whether the policy raised.
            ordered: Whether a layer freezes only together with those in front of it.
        """
        self.seen += 1
        self.failed += failed
        rest = {name: p for name, p in probabilities.items() if math.isfinite(p) and name not in chosen}
        best = max(rest, key=lambda name: rest[name], default=None)
        if best is not None and (not self.layer or rest[best] >= self.probability):
            before = list(rest)[: list(rest).index(best)] if ordered else []
            self.layer, self.probability, self.step, self.reason = best, rest[best], step, reasons.get(best, "")
            self.front = min(before, key=lambda name: rest[name], default="")
            self.front_probability = rest.get(self.front, 0.0)
        if not probabilities:
            self.last = dict(list(reasons.items())[:1])

    def state_dict(self) -> dict[str, Any]:
        """Return all fields, JSON-serializable."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Stages:
        """Rebuild from the output of `state_dict`; None: start from nothing."""
        return cls(**state) if state else cls()


def outcome(
    *,
    step: int,
    layers: Sequence[str],
    frozen: Sequence[str],
    events: Sequence[FreezeEvent],
    policy: str,
    stages: Stages,
    threshold: float | None = None,
    first_stage: int | None = None,
    total_steps: int | None = None,
    dry_run: bool = False,
) -> str:
    """Say what froze, or why nothing did.

    Args:
        step: The last step.
        layers: All layers, front to back.
        frozen: The layers that are frozen now.
        events: All events of the run.
        policy: Name of the policy; "manual" where none decides.
        stages: The policy's decisions.
        threshold: The probability from which a layer freezes, in [0, 1]; None where unknown.
        first_stage: Step of the first freezing stage; None where unknown.
        total_steps: Length of the run in steps; None where unknown.
        dry_run: Whether the run only records decisions.

    Returns:
        A sentence without its full stop.
    """
    changes = [e for e in events if e.kind in ("freeze", "thaw")]
    if changes or frozen:
        return _froze(layers, frozen, changes)
    wished = list(dict.fromkeys(name for e in events if e.kind == "decision" and e.dry_run for name in e.layers))
    if dry_run and wished:
        return f"a dry run: nothing was frozen; the policy {policy} would have frozen {layer_names(wished, layers)}"
    undone = [e for e in events if e.kind == "undone" and e.message.startswith("freeze")]
    if undone:
        last, were = undone[-1], "was" if len(undone) == 1 else "were"
        return f"nothing was frozen: {some(len(undone), 'freeze')} failed and {were} undone; step {last.step:,}: {last.message}"
    return "nothing was frozen: " + _why(step, policy, stages, threshold, first_stage, total_steps)


def _froze(layers: Sequence[str], frozen: Sequence[str], changes: Sequence[FreezeEvent]) -> str:
    freezes = [e for e in changes if e.kind == "freeze"]
    parts = [f"{layer_names(e.layers, layers)} at step {e.step:,}" for e in freezes[:4]]
    if len(freezes) > 4:
        parts.append(f"… in {len(freezes)} freezes")
    text = f"froze {', '.join(parts)}" if parts else "no freeze in this record"
    thaws = [e for e in changes if e.kind == "thaw"]
    if thaws:
        back = sum(any(r.startswith("guard:") for r in e.reasons.values()) for e in thaws)
        text += f"; {some(len(thaws), 'thaw')}" + (f", {back} of them by the guard" if back else "")
    now = f": {layer_names(frozen, layers)}" if frozen else ""
    return f"{text}; {len(frozen)} of {some(len(layers), 'layer')} frozen now{now}"


def _why(step: int, policy: str, stages: Stages, threshold: float | None, first_stage: int | None, total_steps: int | None) -> str:
    if policy == "manual":
        return "the policy is manual, and freeze() was not called"
    if not stages.seen:
        if first_stage is not None and (step < first_stage or first_stage == total_steps):
            last = ", its last, at which nothing is decided" if first_stage == total_steps else ""
            return f"no freezing stage came: the run had {some(step, 'step')}, the first stage would be at step {first_stage:,}{last}"
        return "at no freezing stage there was a layer that the policy may freeze"
    at = f"the policy {policy} was asked at {some(stages.seen, 'freezing stage')}"
    if stages.failed == stages.seen:
        return f"{at} and failed at each (see the warning)"
    if not stages.layer:
        told = "; ".join(f"{name}: {reason}" for name, reason in stages.last.items())
        return f"{at} and named no layer" + (f"; at the last, {told}" if told else "")
    limit = "" if threshold is None else f", the threshold is {threshold:.3f}"
    text = f"{at}; the most certain layer was {stages.layer} with probability {stages.probability:.3f} at step {stages.step:,}{limit}"
    if threshold is not None and stages.probability >= threshold:
        if stages.front and stages.front_probability < threshold:
            return f"{text}, but {stages.front} in front of it was at {stages.front_probability:.3f}"
        return f"{text}" + (f" ({stages.reason})" if stages.reason else "")
    return text
