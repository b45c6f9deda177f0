"""The `schedule` policy: phases that freeze and thaw named layers, and `manual`, the schedule without a phase.

Gradual unfreezing is a schedule whose first phase freezes all layers but the head.
Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT), ACL 2018, section 3.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from smartfrz_ds.config.schedule import EXPRESSION, PhaseSettings
from smartfrz_ds.model.finding.patterns import nearest
from smartfrz_ds.model.view import LayerInfo, Need, View
from smartfrz_ds.policies.base import Decision

_KEY = "smartfrz.schedule.phases"


class SchedulePolicy:
    """Makes the changes of each phase when it begins: at its step, or once a metric no longer falls."""

    name = "schedule"
    needs: frozenset[Need] = frozenset()

    def __init__(
        self,
        phases: Sequence[PhaseSettings | Mapping[str, Any]] = (),
        from_log: str | None = None,
        epochs: float | None = None,
        order: Literal["front_to_back", "back_to_front", "any"] = "front_to_back",
    ) -> None:
        """Take the phases.

        Args:
            phases: The phases in their order, with numbers of steps at `begin`.
            from_log: The log from which they come, if any.
            epochs: Not used: phases that begin at an epoch have their steps already.
            order: `smartfrz.order`, which no phase may break.
        """
        self.phases = tuple(x if isinstance(x, PhaseSettings) else PhaseSettings.model_validate(x) for x in phases)
        self.from_log, self.epochs, self.order = from_log, epochs, order
        self._named: list[tuple[tuple[str, ...], tuple[str, ...]]] = []  # of each phase: the layers that it freezes, and thaws
        self._done = 0  # phases that have begun
        self._best: float | None = None
        self._without = 0  # freezing stages in a row without a new best

    def change_steps(self, total_steps: int | None) -> frozenset[int]:
        """Return the steps at which phases begin."""
        return frozenset(phase.begin for phase in self.phases if isinstance(phase.begin, int))

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Find the layers of each phase, and check that each phase changes something that it may change.

        Args:
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.

        Raises:
            ValueError: Names the phase, the pattern or layer, and what is allowed.
        """
        self._named = plan_phases(self.phases, layers, order=self.order, source=self.from_log)

    def decide(self, view: View) -> Decision:
        """Make the changes of the phases that begin now."""
        before, started = set(view.frozen), self._done
        while self._done < len(self.phases) and self._begins(self.phases[self._done], view):
            self._done, self._best, self._without = self._done + 1, None, 0
        if self._done == started:
            return Decision()
        wanted, trains = set(before), set[str]()
        for freeze, thaw in self._named[started : self._done]:
            wanted = (wanted | set(freeze)) - set(thaw)
            trains = (trains - set(freeze)) | set(thaw)
        freezes = tuple(name for name in view.candidates if name in wanted - before)
        thaws = tuple(x.name for x in view.layers if x.name in before - wanted or x.name in trains.intersection(view.user_frozen))
        reason = f"phase {self._done} of {len(self.phases)}"
        return Decision(
            freeze=freezes, thaw=thaws, reasons=dict.fromkeys((*freezes, *thaws), reason), note=f"{reason} since step {view.step}"
        )

    def _begins(self, phase: PhaseSettings, view: View) -> bool:
        if isinstance(phase.begin, int) and phase.begin <= view.step:
            return True
        value = None if phase.plateau is None else view.metrics.get(phase.plateau)
        if value is None:
            return False
        if self._best is None or value < self._best - phase.tolerance * abs(self._best):
            self._best, self._without = value, 0
        else:
            self._without += 1
        return self._without >= phase.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the number of phases that have begun, their layers, and the state of a plateau."""
        begun = [[list(freeze), list(thaw)] for freeze, thaw in self._named[: self._done]]
        return {"begun": begun, "best": self._best, "without": self._without}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned. If the begun phases were edited since, all that are due begin again, in order."""
        begun = [(tuple(freeze), tuple(thaw)) for freeze, thaw in state["begun"]]
        same = begun == self._named[: len(begun)]
        self._done = len(begun) if same else 0
        self._best, self._without = (state["best"], int(state["without"])) if same else (None, 0)


class ManualPolicy(SchedulePolicy):
    """Never changes anything by itself: only `controller.freeze` and `thaw` do."""

    name = "manual"

    def __init__(self) -> None:
        super().__init__()


def plan_phases(
    phases: Sequence[PhaseSettings], layers: Sequence[LayerInfo], *, order: str, source: str | None = None
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Find the layers that each phase freezes and thaws, front to back.

    Args:
        phases: The phases.
        layers: All layers, front to back.
        order: `smartfrz.order`.
        source: The log from which the phases come, for messages; None: the settings.

    Raises:
        ValueError: A pattern matches no layer that a policy may freeze or thaw, a phase changes nothing, or it breaks `order`.
    """
    found = []
    frozen: set[str] = set()
    users = {layer.name for layer in layers if layer.numel == 0}  # frozen before the start: the user's, until a phase names them
    for number, phase in enumerate(phases):
        key = f"{_KEY}[{number}]" if source is None else f"{source}, step {phase.begin}"
        freeze = _names(phase.freeze, [x for x in layers if x.kind != "head"], layers, f"{key}.freeze")
        thaw = _names(phase.thaw, layers, layers, f"{key}.thaw")
        if both := set(freeze) & set(thaw):
            raise ValueError(f"{key}: {sorted(both)} are in freeze and in thaw; allowed: in one of them")
        gone, back = set(freeze) - frozen - users, set(thaw) & (frozen | users)
        if not gone and not back:
            raise ValueError(
                f"{key}: changes nothing: freeze names {list(freeze)}, thaw {list(thaw)}, and frozen by then are {sorted(frozen)}; "
                "allowed: a phase that freezes an active layer or thaws a frozen one"
            )
        frozen = (frozen | gone) - set(thaw)
        users -= set(thaw)
        if all(x.name in frozen or x.name in users for x in layers):
            raise ValueError(f"{key}: nothing would be left to train; allowed: at least one layer that trains in each phase")
        _check_order(layers, frozen, users, key, order)
        found.append((freeze, thaw))
    return found


def _names(patterns: Sequence[str], among: Sequence[LayerInfo], layers: Sequence[LayerInfo], key: str) -> tuple[str, ...]:
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {x.name for x in among if _matches(x.name, pattern)}
        if not hits:
            if any(_matches(x.name, pattern) for x in layers):
                raise ValueError(f"{key}: {pattern!r} matches only the head, which no policy freezes; allowed: other layers")
            raise ValueError(f"{key}: {pattern!r} matches no layer; {nearest(pattern, [x.name for x in layers])}")
        chosen |= hits
    return tuple(x.name for x in layers if x.name in chosen)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(EXPRESSION):
        return re.fullmatch(pattern.removeprefix(EXPRESSION), name) is not None
    return fnmatchcase(name, pattern)


def _check_order(layers: Sequence[LayerInfo], frozen: set[str], users: set[str], key: str, order: str) -> None:
    if order == "any":
        return
    active = ""
    for layer in layers if order == "front_to_back" else [x for x in reversed(layers) if x.kind != "head"]:
        if active and layer.name in frozen:
            where = "in front of" if order == "front_to_back" else "behind"
            raise ValueError(
                f"{key}: {layer.name!r} would be frozen while {active!r} {where} it trains "
                f"(smartfrz.order is {order!r}; allowed with 'any')"
            )
        active = active or (layer.name if layer.name not in frozen and layer.name not in users else "")
