"""Moving layers between the stages of a pipeline: after a freeze, when the user asks, and before a checkpoint is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from smartfrz_ds.backends.pipeline.protocol import Pipeline
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.errors import ChangeUndone
from smartfrz_ds.model.freeze_modules import freeze_modules, remember_modules
from smartfrz_ds.planner.width import Width
from smartfrz_ds.runtime.observers.protocol import LayoutChange, StepObserver
from smartfrz_ds.runtime.run_context import RunContext
from smartfrz_ds.telemetry.events import FreezeEvent

from .freezer import Freezer
from .memory_check import check_memory, place_of
from .pauses import Pauses
from .transact import transact


class StageMoves(StepObserver):
    """Moves the layers of one pipeline. Collective throughout.

    width: what would be worth more than a move: fewer stages with more replicas.
    """

    def __init__(self, run: RunContext, pipeline: Pipeline, freezer: Freezer, pauses: Pauses) -> None:
        self._run, self._freezer, self._pauses = run, freezer, pauses
        self.rebalancer = pipeline
        self.width: Width | None = None
        self._asked = False  # the user's rebalance() waits for costs to be measured

    def rebalance(self, bounds: Sequence[int] | None = None) -> tuple[int, ...]:
        """Carry out `Controller.rebalance`."""
        run, rebalancer = self._run, self.rebalancer
        run.ranks.assert_same(f"bounds {bounds} at step {run.state.step}", "bounds")
        if not run.backend.is_boundary():
            raise RuntimeError("rebalance only at a step boundary: not within train_batch")
        if bounds is None:
            self._look(moves=True)
            self._asked = rebalancer.due
            if self._asked:
                run.journal.note("rebalance(): the costs of the layers are measured in the next steps; they move then, if that is worth it")
        elif tuple(bounds) != rebalancer.bounds:
            self._check(bounds)
            self._move(bounds, rebalancer.gain(bounds))
        return rebalancer.bounds

    def restore_bounds(self, bounds: Sequence[int] | None) -> None:
        """Bring the stages to these bounds before a checkpoint is loaded; None: to those with which the run began. Collective.

        Raises:
            ValueError, RuntimeError: This is not possible. Raised on every rank; nothing was changed.
        """
        wanted = self.rebalancer.first_bounds if bounds is None else tuple(bounds)
        if wanted != self.rebalancer.bounds:
            self._check(wanted)
            self._move(wanted)

    def if_due(self) -> None:
        """Look at the stages where the layout has changed since the last look."""
        if self.rebalancer.due:
            self._look(moves=self._asked or self._run.config.pipeline.rebalance == "on_freeze")
            self._asked = self._asked and self.rebalancer.due

    def _look(self, *, moves: bool) -> None:
        """Look for a better cut with the layers that are frozen now. moves: whether layers may move."""
        run = self._run
        move, self.width = self.rebalancer.decide(self._pauses.between_stages(), moves=moves)
        if self.width is not None:
            run.journal.note(self.width.advice(run.checkpoint_folder))
        if move is not None and move.problem:
            run.journal.warn(move.problem)
        elif move is not None:
            try:
                self._check(move.bounds)
            except Exception as error:  # a layer's constructor, for example: the run continues unchanged
                run.journal.warn(f"the layers stay where they are: {error}")
            else:
                with suppress(ChangeUndone):  # it is logged, and the run continues
                    self._move(move.bounds, move.gain)

    def _check(self, bounds: Sequence[int]) -> None:
        """Check everything that can refuse these bounds, memory first: then the layers that arrive are built. Collective.

        Raises:
            ValueError, RuntimeError: The bounds are not possible. Raised on every rank; nothing was changed.
        """
        run, here = self._run, place_of(self._run, self.rebalancer.memory_need(bounds))
        check_memory(run, here, run.ranks.gather_integers(here.numbers), f"move layers to the bounds {list(bounds)}", keep=False)
        self.rebalancer.check(bounds)
        self._run.ranks.run_on_all_ranks(lambda: self._freezer.await_others(self._change()))

    def _change(self) -> LayoutChange:
        return LayoutChange(kind="move", frozen=frozenset(self._run.state.frozen))

    def _move(self, bounds: Sequence[int], gain: float | None = None) -> None:
        """Move layers to these bounds, after `_check`.

        Args:
            bounds: The new bounds of the stages.
            gain: Predicted speed-up of a step; None: the move is part of loading a checkpoint, and is not recorded as an event.
        """
        run, rebalancer = self._run, self.rebalancer
        start, old = time.perf_counter(), rebalancer.bounds
        sent = transact(self._run, "rebalance", lambda tx: self._carry_out(bounds, tx))
        moved = run.ranks.sum(sent)
        self._freezer.tell(self._change())
        seconds = time.perf_counter() - start
        run.time.add_change(seconds)
        if gain is not None:
            event = FreezeEvent(
                kind="rebalance",
                step=run.state.step,
                frozen=run.state.frozen_in_order,
                seconds=seconds,
                moved_bytes=moved,
                bounds=rebalancer.bounds,
                gain=gain,
                message=f"stages {list(old)} became {list(rebalancer.bounds)}",
            )
            run.journal.record(event)
        self._freezer.complete(self._change())

    def _carry_out(self, bounds: Sequence[int], tx: Transaction) -> int:
        """Move layers within a transaction. Returns the bytes that this rank sent."""
        run = self._run

        def follow_bounds() -> None:
            run.backend.on_layout_changed(run.layers, run.state.frozen)

        # Undone last: the engine derives everything that depends on its bounds from the previous ones again.
        with tx.step("follow the previous bounds", undo=follow_bounds):
            pass
        sent = self.rebalancer.move(bounds, tx)
        frozen = [layer for layer in run.layers if layer.name in run.state.frozen]
        with tx.step("freeze the modules that have arrived", undo=remember_modules(m for layer in frozen for m in layer.modules)):
            for layer in frozen:
                freeze_modules(layer, run.config.frozen_mode, run.config.tied)
        with tx.step("follow the bounds"):
            follow_bounds()
        with tx.step("verify"):
            run.backend.verify()
        return sent

    @property
    def note(self) -> str:
        """The advice to use fewer stages, empty where there is none."""
        return "" if self.width is None else self.width.advice(self._run.checkpoint_folder)

    def on_layout_change(self, change: LayoutChange) -> None:
        if change.kind in ("freeze", "thaw"):
            self.rebalancer.due = True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.width = None
        self.rebalancer.due = bool(self._run.state.frozen)

    def remove(self) -> None:
        self.rebalancer.remove()
