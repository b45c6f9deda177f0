"""The prefix cache of one frozen prefix on one rank: each forward is complete, checked, or skips the frozen layers.

A forward in which gradients are on and the model is in training mode has keys. If all its rows are stored, the frozen layers are skipped;
else it runs completely and its rows are stored. Before the first use in a class of batches (shapes, dtypes, other arguments, state of the
prefix), a batch is run both ways and compared bit for bit: the forward without the frozen layers first, then the complete one, which is the
one that is trained on. Rows of different stored batches are used together only after such a comparison of a batch composed of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from .around import Around, call_of, is_wrapped
from .border import Capture, Carried, Discovery, Replay, Scope
from .gain import Gain
from .keys import Batch, describe
from .plan import Call, CallDiffers, Plan, Rows
from .proof import RandomState, difference, refusal, same_bits, undone
from .proof import named_modules as named_modules
from .state import PrefixState
from .store import Found
from .tiers import Tiers

_CLASSES = 256  # classes of batches that are kept


@dataclass
class _Kind:
    """What is known of one class of batches."""

    plan: Plan | None = None
    proven: set[bool] = field(default_factory=set)  # composed of several stored batches, or one of them again
    hits: int = 0  # since the last comparison
    off: str = ""


class PrefixCache:
    """Stored outputs of a frozen prefix.

    Args:
        model: The model.
        tops: The modules of the frozen prefix, each as large as possible.
        later: Those of the layers behind it.
        stored: Returns this rank's stored part of a parameter.
        restore_flags: Switches frozen parameters off again that other code has switched on.
        device: The device on which the model runs.
        store: The rows of this host.
        spot_check: One hit in this many is run completely and compared.
        reopen: Given a frozen module and its output; returns the output as this package's hooks would leave it.
        tell: Called with each remark, for the log.
        shallower: The cache of a part of this prefix, which was removed from the model: its rows are carried to this border.

    Attributes:
        off: Why the cache is off; "" while it is in use.
        is_fault: Whether that is an error of the disk, or of the memory, that holds the rows.
        is_damaged: Whether stored rows turned out to be wrong that may have been used.
        remarks: Why single classes of batches, or calls, are not cached.
        gain: Counts and times.
        trained: Forwards that may have been trained on.
        forwards_of_step: Those of the current step.
        complete_of_step: Those of them that ran completely.
    """

    def __init__(
        self,
        model: nn.Module,
        tops: Sequence[nn.Module],
        later: Sequence[nn.Module],
        *,
        stored: Callable[[nn.Parameter], Tensor],
        restore_flags: Callable[[], None],
        device: torch.device,
        store: Tiers,
        spot_check: int,
        reopen: Callable[[nn.Module, Any], Any],
        tell: Callable[[str], None],
        shallower: PrefixCache | None = None,
    ) -> None:
        self._model, self._tops, self._later, self._device = model, tuple(tops), tuple(later), device
        self._store, self._spot_check, self._reopen, self._tell = store, spot_check, reopen, tell
        self._shallower = shallower
        if shallower is not None:
            shallower._shallower = None
        self._kinds: dict[bytes, _Kind] = {}
        self._scope: Scope | None = None
        self._skipped_last = False  # whether the last forward of the model skipped the prefix
        self.remarks: list[str] = []
        self.is_fault = self.is_damaged = False
        self.gain = Gain()
        self.forwards_of_step = self.complete_of_step = self.trained = 0
        self._around: list[Around] = []
        self.off = refusal(named_modules(model, self._tops))
        if any(isinstance(m, nn.DataParallel) for m in model.modules()):
            self.off = "torch.nn.DataParallel copies the modules in each forward"
        if taken := next((type(m).__name__ for m in (model, *self._tops) if is_wrapped(m)), ""):
            self.off = self.off or f"other code has replaced the call of a {taken}"
        if self.off:
            return
        self._state = PrefixState(model, self._tops, self._later, stored=stored, restore_flags=restore_flags)
        self._around = [Around(model, self._forward), *(Around(top, self._frozen_module) for top in self._tops)]
        for around in self._around:
            around.install()

    def suspect(self) -> None:
        """Read all weights of the prefix before the next use: a checkpoint was loaded, for example."""
        if not self.off:
            self._state.suspect()

    def remove(self) -> None:
        """Give all modules their own calls back."""
        for around in self._around:
            around.remove()
        self._around.clear()

    def is_part_of(self, tops: Sequence[nn.Module]) -> bool:
        """Whether a prefix of these modules contains this one, and is longer."""
        return len(tops) > len(self._tops) and tuple(tops[: len(self._tops)]) == self._tops

    def turn_off(self, reason: str, *, is_fault: bool = False) -> None:
        """End the use of the cache: `off` says why."""
        self.is_fault = self.is_fault or (is_fault and not self.off)
        self.off = self.off or reason

    # --- the model's call -----------------------------------------------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = partial(call_of, module, args, kwargs)
        if self.off or self._scope is not None:
            return call()
        if not module.training or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            # An evaluation or a reference pass: nothing is stored or used. It may have left other weights behind.
            self._state.suspect()
            return call()
        began = perf_counter()
        state = self._state.token()
        if self._state.refusal:
            self.turn_off(self._state.refusal)
            return call()
        batch = describe(args, kwargs, state)
        self.forwards_of_step += 1
        self.trained += 1
        self.complete_of_step += 1
        self._skipped_last = False
        if isinstance(batch, str):
            self._remark(batch)
            return call()
        kind = self._kinds.setdefault(batch.kind, _Kind())
        if len(self._kinds) > _CLASSES:
            if not self.gain.hits:
                self.turn_off(
                    f"more than {_CLASSES} kinds of batches, and no batch came back in its kind: each combination of shapes (padded to "
                    "the longest row?) and arguments (the number of the batch?) is one"
                )
            self._kinds.pop(next(iter(self._kinds)))
        if kind.off:
            return call()
        try:
            found, rows = self._look_up(kind, batch)
        except OSError as error:
            self.turn_off(f"its rows can't be read: {error}", is_fault=True)
            return call()
        keys = perf_counter() - began
        if rows is None or found is None:
            return self._complete(kind, batch, call, keys, self._carried(args, kwargs))
        mixed = not _is_one_batch(found)
        if mixed in kind.proven and kind.hits < self._spot_check:
            return self._skip(kind, rows, call, began)
        return self._compare(kind, batch, rows, mixed, call, partial(module.forward, *args, **kwargs))

    def _look_up(self, kind: _Kind, batch: Batch) -> tuple[list[tuple[int, Found]] | None, Rows | None]:
        found = self._store.find(batch.keys)
        there = [x for x in found if x is not None]
        is_hit = len(there) == len(found) and kind.plan is not None
        self.gain.seen(len(there), is_hit)
        if not is_hit:
            return None, None
        assert kind.plan is not None
        rows = Rows(kind.plan)
        return (there, rows) if self._store.read(there, rows.views()) else (None, None)

    def _carried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Replay | None:
        """Return the replay of this batch at the shallower border, if all of its rows are there and proven."""
        old = self._shallower
        if old is None or old.off or not (state := old._state.token()) or old._state.refusal:
            return None
        batch = describe(args, kwargs, state)
        kind = None if isinstance(batch, str) else old._kinds.get(batch.kind)
        if kind is None or kind.plan is None or kind.off or isinstance(batch, str):
            return None
        try:
            found, rows = old._look_up(kind, batch)
        except OSError as error:
            self.turn_off(f"its rows can't be read: {error}", is_fault=True)
            return None
        if found is None or rows is None or (not _is_one_batch(found)) not in kind.proven:
            return None
        return Replay(kind.plan, rows.on_device(), self._reopen)

    def _complete(self, kind: _Kind, batch: Batch, call: Call, keys: float, carried: Replay | None = None) -> Any:
        """Run the whole model, or its part behind a shallower border, and store the rows."""
        forward: Discovery | Capture
        forward = Discovery(batch.rows, self._later, self._device) if kind.plan is None else Capture(kind.plan, self._device)
        before, began = None if carried is None else RandomState(self._device), perf_counter()
        rows: Rows | None = None
        try:
            output = self._within(forward if carried is None else Carried(forward, carried), call)
        except CallDiffers:  # of the shallower border; no active layer has run yet
            assert before is not None
            before.restore()
            self._shallower = None
            return self._complete(kind, batch, call, keys)
        finally:
            if isinstance(forward, Discovery):
                plan, rows = forward.finish()
        if carried is not None:
            self._check_calls(carried)
            self._skipped_last = True
            self.gain.carried += 1
        if isinstance(forward, Discovery):
            kind.plan = plan
            if forward.reason:
                self._drop(kind, forward.reason)
            elif rows is not None:
                self._write(batch, rows)
        elif not forward.complete:
            self._drop(kind, forward.reason or "the model did not call all of its frozen layers")
        else:
            writing = perf_counter()
            self._write(batch, forward.rows)
            if carried is None:
                write = perf_counter() - writing + forward.packing
                self.gain.filled(prefix=forward.passed - began - forward.packing, keys=keys, write=write)
        return output

    @staticmethod
    def _check_calls(replay: Replay) -> None:
        if not replay.complete:
            raise RuntimeError(
                "the prefix cache skipped frozen layers that this forward did not call, although its arguments were those of forwards that "
                "did: the result may be wrong; allowed: smartfrz.cache.mode 'off'"
            )

    def _write(self, batch: Batch, rows: Rows) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        try:
            self._store.insert(batch.keys, rows.views())
        except OSError as error:
            self.turn_off(f"its rows can't be stored: {error}", is_fault=True)

    def _skip(self, kind: _Kind, rows: Rows, call: Call, began: float) -> Any:
        """Run the model without its frozen layers."""
        assert kind.plan is not None
        replay, before = Replay(kind.plan, rows.on_device(), self._reopen), RandomState(self._device)
        reading = perf_counter()
        kind.hits += 1
        try:
            output = self._within(replay, call)
        except CallDiffers as error:  # no active layer has run yet
            before.restore()
            self._drop(kind, str(error))
            return call()
        self._check_calls(replay)
        self._skipped_last = True
        self.complete_of_step -= 1
        self.gain.hit(keys=reading - began, read=replay.passed - reading)
        return output

    def _compare(self, kind: _Kind, batch: Batch, rows: Rows, mixed: bool, call: Call, bare: Call) -> Any:
        """Run the whole model, and compare the stored rows with it; the first time also the output without the frozen layers."""
        assert kind.plan is not None
        first, skipped, reason = mixed not in kind.proven, None, ""
        if first:
            replay = Replay(kind.plan, rows.on_device(), self._reopen)
            with undone(self._model, self._device):
                try:
                    skipped = self._within(replay, bare)
                except Exception as error:  # placeholders can lead anywhere; the complete forward follows
                    reason = f"without the frozen layers the model raises {type(error).__name__}: {error}"
                if not reason and not replay.complete:
                    reason = "without the frozen layers the model calls them differently"
        capture = Capture(kind.plan, self._device)
        output = self._within(capture, call)
        kind.hits = 0
        if not capture.complete:
            reason = reason or capture.reason or "the model did not call all of its frozen layers"
        elif not all(same_bits(x, y) for x, y in zip(rows.tensors, capture.rows.tensors, strict=True)):
            if not first:
                self.is_damaged = True
                self.turn_off(
                    "a comparison found stored rows that differ from computed ones: the steps since the last comparison used them"
                )
                return output
            reason = (
                "a batch composed of rows of several batches has other bits: a row depends on its neighbours"
                if mixed
                else ("the same batch has other bits when it comes again")
            )
        elif first and not reason:
            reason = difference(output, skipped)
        if reason:
            self._drop(kind, reason)
        elif first:
            kind.proven.add(mixed)
            of = "rows of several stored batches" if mixed else "a stored batch"
            self._tell(f"prefix cache: proven for {batch.rows} rows of {kind.plan.row_bytes:,} bytes, on {of}")
        self.gain.forwards += 1
        return output

    def _within(self, forward: Discovery | Capture | Replay | Carried, call: Call) -> Any:
        self._scope = Scope(forward)
        try:
            return call()
        finally:
            self._scope = None

    # --- a frozen module's call -----------------------------------------------------------------------------------------------

    def _frozen_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        real = partial(call_of, module, args, kwargs)
        scope = self._scope
        if scope is not None and scope.is_here():
            return scope.forward.call(module, real, args, kwargs)
        if not self.off and torch._C._current_graph_task_id() != -1:  # torch/csrc/autograd/engine.cpp: inside a backward
            reason = "activation checkpointing runs frozen layers again in backward, in one region with active ones"
            self.turn_off(reason)
            if self._skipped_last:
                raise RuntimeError(
                    f"prefix cache: {reason}, and the forward had skipped them: the step can't be completed exactly; allowed: switch "
                    "activation checkpointing on before layers freeze, or smartfrz.cache.mode 'off'"
                )
        return real()

    # --- reasons --------------------------------------------------------------------------------------------------------------

    def _drop(self, kind: _Kind, reason: str) -> None:
        kind.off, kind.plan = reason, None
        self._remark(reason)

    def _remark(self, reason: str) -> None:
        if reason not in self.remarks:
            self.remarks.append(reason)
            self._tell(f"prefix cache: not used for some batches: {reason}")

    @property
    def changes(self) -> int:
        """How often the weights of the prefix turned out to have changed."""
        return 0 if self.off else self._state.changes


def _is_one_batch(found: Sequence[tuple[int, Found]]) -> bool:
    """Whether these rows are one stored batch, complete and in its order."""
    return all(x.source == found[0][1].source and x.place == place for place, (_, x) in enumerate(found))
