"""The transaction that brings the engine to another frozen set.

    prepare   every check that can refuse the change, on all ranks; changes nothing
    commit    the engine changes; an error on any rank brings every rank back to the previous layout
    notify    the observers learn the new layout, and the event is recorded

Collective throughout, in the same order on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

from torch.nn import Parameter

from smartfrz_ds.backends.base import Released
from smartfrz_ds.backends.cost import PausePrediction
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.errors import ChangeUndone, FreezeError, NotEnoughMemory
from smartfrz_ds.model.freeze_modules import check_tied, freeze_modules, leaving_params, remember_modules, thaw_modules
from smartfrz_ds.runtime.observers.protocol import LayoutChange, StepObserver
from smartfrz_ds.runtime.rules.eligibility import check_order
from smartfrz_ds.runtime.rules.user_frozen import Restored, UserFrozen
from smartfrz_ds.runtime.run_context import RunContext
from smartfrz_ds.telemetry.events import FreezeEvent

from .memory_check import NUMBERS, Place, check_memory, place_of
from .pauses import Pauses
from .transact import transact

Kind = Literal["freeze", "thaw", "restore"]


class Freezer:
    """Changes the frozen set of one run.

    `users` are the layers that the user froze, `observers` the run's, in their order. `restore_flags` freezes parameters again after
    other code has set `requires_grad`.

    Attributes:
        predicted: The predicted pause of the last freeze or thaw.
    """

    def __init__(
        self,
        run: RunContext,
        users: UserFrozen,
        pauses: Pauses,
        observers: Sequence[StepObserver],
        restore_flags: Callable[[], None],
    ) -> None:
        self._run, self._users, self._pauses, self._observers = run, users, pauses, observers
        self._restore_flags = restore_flags
        self._before_load: set[str] | None = None
        self._warned_uncuttable = self._warned_memory = False
        self.predicted: PausePrediction | None = None

    # --- the transaction ------------------------------------------------------------------------------------------------------

    def change(
        self,
        frozen: set[str],
        *,
        kind: Kind,
        about: Mapping[str, Any] | None = None,
        began: float | None = None,
        adopt: Collection[str] = (),
        groups: Mapping[str, int] | None = None,
        check_adopted: Callable[[tuple[str, ...]], None] = lambda adopted: None,
    ) -> LayoutChange | None:
        """Bring the engine to exactly this frozen set. Collective, at a step boundary.

        Args:
            frozen: Names of the layers that are frozen afterwards.
            kind: "freeze" and "thaw" are events; "restore" brings back the layout of a checkpoint, whatever `order` says.
            about: More fields of the event.
            began: Start of the work for it, in `time.perf_counter()` seconds; None: now.
            adopt: Layers that the user froze and that become this package's.
            groups: Parameter groups of their parameters, by name, as far as they are known.
            check_adopted: Called with the layers that were adopted; raises ValueError, on all ranks, if that is not possible.

        Returns:
            The change; None if the engine has this frozen set already.

        Raises:
            ValueError, RuntimeError: The change is refused, on every rank; nothing was changed.
            ChangeUndone: It failed on some rank after it had started; every rank is back at the previous layout, and can go on training.
            FreezeError: It failed and could not be undone; the engine state is inconsistent.
        """
        began = self._run.start_of_change() if began is None else began
        with self._adopting(adopt, groups) as adopted:
            check_adopted(adopted)
            if frozen == self._run.state.frozen and not adopted:
                return None
            change = self.prepare(frozen, kind, adopted)
            released, released_by_all = self.commit(change)
        self.notify(change, released, released_by_all, about or {}, began)
        return change

    def try_change(
        self, frozen: set[str], *, kind: Kind, about: Mapping[str, Any], began: float | None = None, adopt: Collection[str] = ()
    ) -> bool:
        """Carry out `change` for a decision that the user did not make: if it fails and is undone, it is logged and the run continues.

        Returns: whether the change was started; False, with one warning, if memory is short.
        """
        try:
            with suppress(ChangeUndone):
                self.change(frozen, kind=kind, about=about, began=began, adopt=adopt)
        except NotEnoughMemory as error:
            if not self._warned_memory:
                self._run.journal.warn(f"a {kind} is left out, and training goes on: {error}")
            self._warned_memory = True
            return False
        return True

    def prepare(self, frozen: set[str], kind: Kind, adopted: tuple[str, ...] = ()) -> LayoutChange:
        """Run every check that can refuse this frozen set, on all ranks. Collective; changes nothing.

        Raises:
            ValueError, RuntimeError: Some rank refuses it. Raised on every rank.
        """
        run, before = self._run, self._run.state.frozen
        self._restore_flags()
        leaving = dict.fromkeys(self.leaving(frozen))
        keep = run.keep_steps > 0 and kind != "restore"

        def plan() -> tuple[tuple[LayoutChange, Place], Sequence[int]]:
            self._check_set(frozen, kind)
            freeze = tuple(p for p in leaving if p not in run.backend.frozen)
            own = [p for layer in run.layers for p in (*layer.params, *layer.copies)]
            thaw = tuple(p for p in own if p in run.backend.frozen and p not in leaving)
            run.backend.check(freeze, thaw)
            gone, back = frozenset(frozen - before), frozenset(before - frozen)
            change = LayoutChange(kind=kind, frozen=frozenset(frozen), gone=gone, back=back, freeze=freeze, thaw=thaw, adopted=adopted)
            self.await_others(change)
            here = place_of(run, run.backend.memory_need(freeze, thaw, keep=keep))
            return (change, here), here.numbers

        (change, here), numbers = run.ranks.gather_results(plan, NUMBERS)
        check_memory(run, here, numbers, f"{kind} {', '.join(run.state.in_order(change.gone | change.back))}", keep=keep)
        if kind != "restore":
            self.predicted = self._pauses.predict(self.leaving(frozen))
        return change

    def commit(self, change: LayoutChange) -> tuple[Released, int]:
        """Change the engine, on every rank or on none. Collective.

        Returns:
            The memory that this rank released, and the bytes that all ranks released.

        Raises:
            ChangeUndone: It failed on some rank; every rank is back at the previous layout.
            FreezeError: It failed and could not be undone; the engine state is inconsistent.
        """
        released = transact(self._run, change.kind, lambda tx: self._carry_out(change, tx), layers=change.gone | change.back)
        released_by_all = self._run.ranks.sum(released.bytes)
        state = self._run.state
        state.frozen = set(change.frozen)
        for name in change.gone:
            state.frozen_at[name] = state.step
        for name in change.back:
            state.frozen_at.pop(name, None)
        return released, released_by_all

    def _carry_out(self, change: LayoutChange, tx: Transaction) -> Released:
        """Change optimizer, modules and engine within a transaction."""
        run, restoring = self._run, change.kind == "restore"
        before = frozenset(run.state.frozen)
        # Undone last: the engine derives everything that depends on the layout from the previous one again.
        with tx.step("follow the previous layout", undo=lambda: run.backend.on_layout_changed(run.layers, before)):
            pass
        if restoring:  # the kept state belongs to the run before the load
            kept = run.backend.kept_entries()
            with tx.step("forget what was kept", undo=lambda: run.backend.set_kept_entries(kept)):
                run.backend.forget([p for layer in run.layers for p in (*layer.params, *layer.copies)])
        released = run.backend.change(change.freeze, change.thaw, keep=run.keep_steps > 0 and not restoring, tx=tx)
        modules = [module for layer in run.layers if layer.name in change.gone | change.back for module in layer.modules]
        with tx.step("switch the modules", undo=remember_modules(modules)):
            for layer in run.layers:
                if layer.name in change.gone:
                    freeze_modules(layer, run.config.frozen_mode, run.config.tied)
                elif layer.name in change.back:
                    thaw_modules(layer, run.model.training)
        with tx.step("follow the layout"):
            run.backend.on_layout_changed(run.layers, change.frozen)
        run.backend.equalize_copies(run.layers, change.back, tx)
        with tx.step("verify"):
            run.backend.verify()
        return released

    def notify(self, change: LayoutChange, released: Released, released_by_all: int, about: Mapping[str, Any], began: float) -> None:
        """Tell the observers, and record the event. Collective."""
        run = self._run
        self.tell(change)
        moved = self._pauses.of_all_stages(released.moved_bytes)
        seconds = time.perf_counter() - began
        run.time.add_change(seconds)
        if change.kind != "restore":
            event = FreezeEvent(
                kind="freeze" if change.kind == "freeze" else "thaw",
                step=run.state.step,
                layers=run.state.in_order(change.gone or change.back),
                frozen=run.state.frozen_in_order,
                bytes_released=released.bytes,
                bytes_released_total=released_by_all,
                seconds=seconds,
                predicted_seconds=self.predicted.seconds if self.predicted else 0.0,
                moved_bytes=moved,
                **about,
            )
            run.journal.record(event)
        self.complete(change)

    def await_others(self, change: LayoutChange) -> None:
        """Let the observers wait for other readers of the memory that this change moves, or refuse it. Not collective.

        Raises:
            RuntimeError: An observer refuses.
        """
        for observer in self._observers:
            observer.before_change(change)

    def complete(self, change: LayoutChange) -> None:
        """Let the observers act on a change that is recorded. Collective.

        Raises:
            RuntimeError: An observer failed. Raised on every rank.
        """
        for observer in self._observers:
            observer.after_change(change)

    def tell(self, change: LayoutChange) -> None:
        """Tell the observers of a layout that the engine has already."""
        for observer in self._observers:
            observer.on_layout_change(change)

    # --- what prepare checks --------------------------------------------------------------------------------------------------

    def _check_set(self, frozen: set[str], kind: Kind) -> None:
        """Raise ValueError for a frozen set that the settings don't allow."""
        layers, config = self._run.layers, self._run.config
        lent = config.tied == "train"  # a head without weights of its own trains what it borrows
        if not any((x.numel or (lent and x.is_borrower)) and x.name not in frozen for x in layers):
            raise ValueError("nothing would be left to train: keep at least one layer active")
        if kind != "restore":  # what a checkpoint holds was allowed when it was saved
            check_order(layers, frozen, config.order)

    def leaving(self, frozen: Collection[str]) -> tuple[Parameter, ...]:
        """Return the parameters that are out of the optimizer when exactly these layers are frozen."""
        run = self._run
        return leaving_params([x for x in run.layers if x.name in frozen], run.layers, run.config.tied)

    def can_cut(self, frozen: set[str]) -> bool:
        """Whether the optimizer's state, and other readers, let these layers be the frozen ones. Collective; warns once where not."""
        run = self._run
        leaving = [p for p in self.leaving(frozen) if p not in run.backend.frozen]
        own = next((text for text in (run.backend.uncuttable(leaving), *(x.refusal() for x in self._observers)) if text), "")
        why = next((text for text in run.ranks.gather_objects(own) if text), "")
        if why and not self._warned_uncuttable:
            self._warned_uncuttable = True
            run.journal.warn(f"the policy's freezes are left out, and training goes on: {why}")
        return not why

    def predict(self, frozen: Collection[str]) -> PausePrediction:
        """Predict the pause of a change to this frozen set. Collective; changes nothing."""
        return self._pauses.predict(self.leaving(frozen))

    # --- layers that the user froze -------------------------------------------------------------------------------------------

    @contextmanager
    def _adopting(self, names: Collection[str], groups: Mapping[str, int] | None) -> Iterator[tuple[str, ...]]:
        """Adopt layers that the user froze, for a change, which is the block. Collective.

        Yields:
            The names of the adopted layers. If the change is refused or undone, they are the user's again.

        Raises:
            ValueError: They can't train here. They stay the user's.
        """
        if not names:
            yield ()
            return
        before = set(self._users.adopted)

        def new() -> set[str]:
            return set(self._users.adopted) - before

        def adopt() -> None:
            self._users.adopt(names, groups)
            self._run.state.frozen |= new()
            try:
                check_tied(self._run.layers, self._run.config.tied)
                self._layers_changed()
            except ValueError:
                self._return(new())
                raise

        try:
            self._run.ranks.run_on_all_ranks(adopt)
            yield tuple(name for name in self._users.adopted if name not in before)
        except FreezeError:
            raise
        except (ValueError, RuntimeError):
            self._return(new())
            raise

    def return_to_user(self, names: Iterable[str]) -> None:
        """Return to the user those of these layers that are frozen and that the user had frozen before the start."""
        back = set(self._users.adopted).intersection(names, self._run.state.frozen)
        if back:
            self._return(back)
            self.tell(LayoutChange(kind="return", frozen=frozenset(self._run.state.frozen)))

    def _return(self, names: Collection[str]) -> None:
        state = self._run.state
        self._users.disown(names)
        state.frozen.difference_update(names)
        for name in names:
            state.frozen_at.pop(name, None)
        self._layers_changed()

    def _layers_changed(self) -> None:
        for observer in self._observers:
            observer.on_layers_changed()

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    def restore(self, frozen: Iterable[str]) -> None:
        """Bring the layout to this frozen set before tensors are loaded: moments of layers that come back are zero. Collective.

        Raises:
            RuntimeError: The set differs from the current one, and this is not a step boundary.
        """
        with self._noting_layout():
            self.change(set(frozen), kind="restore")

    def restore_of(self, state: Mapping[str, Any], *, by_position: bool = False) -> Restored:
        """Restore a freeze state, also if other layers are the user's than when it was saved. Collective.

        Args:
            state: The freeze state.
            by_position: Whether the optimizer's state is loaded by position, so that its groups must hold the same parameters in the
                same order.

        Raises:
            ValueError: They do not, because the user froze other layers; nothing was changed.
        """
        users = state.get("user_frozen")
        if users is None:  # of a version that left such layers alone
            self.restore(state["frozen"])
            return Restored()
        left, run = set(users["left"]), self._run
        ours = tuple(name for name in run.state.layers if name in left and name not in self._users.names)

        def check_positions(adopted: tuple[str, ...]) -> None:
            if by_position and (ours or adopted):
                run.ranks.run_on_all_ranks(lambda: self._users.check_positions(users, ours))

        with self._noting_layout():
            change = self.change(
                {*state["frozen"], *ours},
                kind="restore",
                adopt=set(self._users.names) - left,
                groups=self._users.groups_in(users),
                check_adopted=check_positions,
            )
        return Restored(() if change is None else change.adopted, ours)

    @contextmanager
    def _noting_layout(self) -> Iterator[None]:
        """Remember the frozen layers before the block, for the record of the load that follows if it succeeds."""
        noted = self._before_load
        if noted is None:
            self._before_load = set(self._run.state.frozen)
        try:
            yield
        except Exception:
            self._before_load = noted
            raise

    def layout_before_load(self) -> set[str]:
        """Return the frozen set before the load that is being recorded, and forget it."""
        before, self._before_load = self._before_load, None
        return set(self._run.state.frozen) if before is None else before

    # --- the end --------------------------------------------------------------------------------------------------------------

    def restore_trainable(self) -> None:
        """Make every layer trainable, without touching the optimizer; the engine is not trained any further."""
        run = self._run
        for layer in run.layers:
            if layer.name in run.state.frozen:
                thaw_modules(layer, run.model.training)
        for param in run.backend.frozen:
            param.requires_grad_(True)
        run.backend.leave()
