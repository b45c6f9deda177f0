"""Policies as users write them, named in settings as 'reference.own_policies:Class': one that works, and broken ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smartfrz_ds import Decision, View


@dataclass
class EveryThird:
    """Freezes the front layer at every third stage at which its weights have moved: what it counts is in the checkpoint."""

    every: int = 3
    layers: tuple[str, ...] = ()
    stages: int = field(default=0, init=False)
    last: float = field(default=0.0, init=False)
    name = "every_third"
    needs = frozenset({"weights"})

    def decide(self, view: View) -> Decision:
        front = view.candidates[0]
        moved = float(view.windows[front].weights[-1].abs().sum())
        self.stages, self.last = self.stages + (moved != self.last), moved
        due = self.stages % self.every == 0
        return Decision(freeze=(front,) if due else (), reasons={front: f"stage {self.stages}"} if due else {})

    def state_dict(self) -> dict[str, Any]:
        return {"stages": self.stages, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stages, self.last = int(state["stages"]), float(state["last"])


class Good:
    """Decides nothing; the broken ones derive from it."""

    name = "good"
    needs: Any = frozenset()

    def decide(self, view: View) -> Any:
        return Decision()

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class NoMethods:
    name = "no_methods"
    needs = frozenset()

    def decide(self, view: View) -> Decision:
        return Decision()


class WrongSignature(Good):
    def decide(self) -> Any:  # type: ignore[override]
        return Decision()


class Awaits(Good):
    async def decide(self, view: View) -> Any:
        return Decision()


class Nameless(Good):
    name = ""


class TakesAName(Good):
    name = "linear"


class WrongNeeds(Good):
    needs = frozenset({"losses"})


class HalfRates(Good):
    def lr_scales(self, step: int, total_steps: int | None, layers: Any, keep_active: Any) -> Any:
        return {}


class SavesTensors(Good):
    def state_dict(self) -> Any:
        return {"object": object()}


class CannotLoad(Good):
    def state_dict(self) -> Any:
        return {"stages": 3}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise KeyError("stage")


class Strict(Good):
    def __init__(self, threshold: float, mode: str = "mean", *, names: tuple[str, ...] = ()) -> None:
        if threshold > 1:
            raise ValueError(f"threshold: got {threshold}; allowed: at most 1")
        self.threshold, self.mode, self.names = threshold, mode, names


class RefusesRuns(Good):
    """Refuses a run of unknown length, as `late` does."""

    def check_start(self, total_steps: int | None, layers: Any) -> None:
        if total_steps is None:
            raise ValueError("refuses_runs: the length of the run is unknown")


class Answers(Good):
    """Answers as it is told, at its second stage."""

    def __init__(self, how: str) -> None:
        self.how, self.stages = how, 0

    def decide(self, view: View) -> Any:
        self.stages += 1
        if self.stages != 2:
            return Decision()
        front = view.candidates[:1]
        answers = {
            "nothing": lambda: None,
            "text": lambda: Decision(freeze=front[0]),  # type: ignore[arg-type]
            "unknown": lambda: Decision(freeze=("blocks.99",)),
            "probability": lambda: Decision(freeze=front, probabilities={front[0]: "high"}),  # type: ignore[dict-item]
            "reason": lambda: Decision(freeze=front, reasons={front[0]: 3}),  # type: ignore[dict-item]
            "raises": lambda: 1 / 0,
        }
        return answers[self.how]()


class FailsToSave(Good):
    """Its state is JSON at the start, and no longer at step 2."""

    def __init__(self) -> None:
        self.extra: Any = 0

    def decide(self, view: View) -> Any:
        self.extra = object() if view.step == 2 else 0
        return Decision()

    def state_dict(self) -> Any:
        return {"extra": self.extra}


not_a_class = Good()
