"""What the controller asks of a pipeline. Nothing of DeepSpeed is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from smartfrz_ds.backends.cost import Bandwidths
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.planner.width import Width


@dataclass(frozen=True, kw_only=True)
class Move:
    """bounds: of the stages in the pipeline's list, from now on. gain: how many times faster a step is predicted to be with them than with
    those before. problem: why nothing moves though it should, empty where it does."""

    bounds: tuple[int, ...]
    gain: float
    problem: str = ""


class Pipeline(Protocol):
    """Where a pipeline's layers are, and whether they should move. Collective throughout, in the same order on every rank.

    first_bounds: of the stages as the user's PipelineModule was cut, (stages + 1,).
    due: whether the layout has changed since the stages were last looked at.
    """

    first_bounds: tuple[int, ...]
    due: bool

    @property
    def bounds(self) -> tuple[int, ...]:
        """Of the stages, now."""
        ...

    def decide(self, bandwidths: Bandwidths, *, moves: bool) -> tuple[Move | None, Width | None]:
        """The move that is worth it, where any may be, and the width that would be worth more; None where none is."""
        ...

    def check(self, bounds: Sequence[int]) -> None:
        """Raise ValueError or RuntimeError, on every rank, where the stages can't get these bounds now; nothing is changed."""
        ...

    def move(self, bounds: Sequence[int], tx: Transaction) -> int:
        """Move layers so that these are the bounds, after `check`, within a transaction. Returns the bytes that this rank sent."""
        ...

    def gain(self, bounds: Sequence[int]) -> float:
        """How many times faster a step is predicted to be with these bounds than now; 1 where costs are not known."""
        ...

    def remove(self) -> None:
        """Take all hooks away."""
        ...
