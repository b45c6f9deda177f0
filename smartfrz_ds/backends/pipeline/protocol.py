"""The interface between the controller and a pipeline. Does not import DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from smartfrz_ds.backends.cost import Bandwidths
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.planner.width import Width


@dataclass(frozen=True, kw_only=True)
class StageMove:
    """A decision on the stages of a pipeline.

    Attributes:
        bounds: New bounds of the stages in the list of layers, (stages + 1,).
        gain: Predicted speed-up of a step over the current bounds.
        problem: Why nothing moves although it should; "" if layers move.
    """

    bounds: tuple[int, ...]
    gain: float
    problem: str = ""


class Pipeline(Protocol):
    """The stages of a pipeline. All methods are collective, in the same order on every rank.

    Attributes:
        first_bounds: Bounds of the stages in the user's PipelineModule, (stages + 1,).
    """

    first_bounds: tuple[int, ...]

    @property
    def due(self) -> bool:
        """Whether layers were frozen, thawed or moved since the last `decide`, and that can matter here."""
        ...

    @due.setter
    def due(self, value: bool) -> None: ...

    @property
    def bounds(self) -> tuple[int, ...]:
        """Current bounds of the stages, (stages + 1,)."""
        ...

    def decide(self, bandwidths: Bandwidths, *, moves: bool) -> tuple[StageMove | None, Width | None]:
        """Decide whether moving layers is worth it.

        Args:
            bandwidths: Measured bandwidths.
            moves: Whether layers may move.

        Returns:
            The best move, and a number of stages and replicas that would be faster still; None where there is none.
        """
        ...

    def check(self, bounds: Sequence[int]) -> None:
        """Check that the stages can get these bounds now. Changes nothing.

        Raises:
            ValueError: The bounds are not possible. Raised on every rank.
            RuntimeError: Not at this time. Raised on every rank.
        """
        ...

    def memory_need(self, bounds: Sequence[int]) -> MemoryNeed:
        """Return the peak memory of a move to these bounds above the level before it, on this rank. Changes nothing."""
        ...

    def move(self, bounds: Sequence[int], tx: Transaction) -> int:
        """Move layers to these bounds, after `check`, within a transaction.

        Returns:
            The bytes that this rank sent.
        """
        ...

    def gain(self, bounds: Sequence[int]) -> float:
        """Return the predicted speed-up of a step with these bounds; 1 where costs are not known."""
        ...

    def remove(self) -> None:
        """Remove all hooks."""
        ...
