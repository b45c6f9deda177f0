"""The prefix cache of one frozen prefix on one rank: each forward is complete, checked, or skips the frozen layers.

A forward in which gradients are on and the model is in training mode has keys. If all its rows are stored, the frozen layers are skipped;
else it runs completely and its rows are stored. Before the first use in a class of batches (shapes, dtypes, other arguments, state of the
prefix), a batch is run both ways and compared bit for bit: the forward without the frozen layers first, then the complete one, which is the
one that is trained on. Rows of different stored batches are used together only after such a comparison of a batch composed of them.

With an engine that gathers weights in forward, all ranks do the same with their batches (agreement.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from smartfrz_ds.backends.forward_ways import ForwardWays
from smartfrz_ds.distributed.collectives import Collectives

from .agreement import Agreement, Way, common_way
from .around import Around, Course, call_of, call_with_engine, structure_refusal
from .border import Capture, Carried, Discovery, Replay, Scope
from .gain import Gain
from .keys import KEY_BYTES, Batch
from .lookup import Kind, Look, Lookup
from .plan import Call, CallDiffers, Rows
from .proof import RandomState, difference, same_bits, undone
from .proof import named_modules as named_modules
from .state import PrefixState
from .tiers import Tiers


class PrefixCache:
    """Stored outputs of a frozen prefix.

    Args:
        model: The model.
        tops: The modules of the frozen prefix, each as large as possible.
        later: Those of the layers behind it.
        stored: Returns this rank's stored part of a parameter.
        ways: The part of the engine that must know which modules a forward runs.
        ranks: The ranks that must do the same; None if this one decides for itself.
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
        ways: ForwardWays,
        ranks: Collectives | None,
        restore_flags: Callable[[], None],
        device: torch.device,
        store: Tiers,
        spot_check: int,
        reopen: Callable[[nn.Module, Any], Any],
        tell: Callable[[str], None],
        shallower: PrefixCache | None = None,
    ) -> None:
        self._model, self._tops, self._later, self._device = model, tuple(tops), tuple(later), device
        self._store, self._reopen, self._tell, self._ways = store, reopen, tell, ways
        self._agreement = None if ranks is None else Agreement(ranks)
        self._shallower = () if shallower is None else shallower._tops
        self._wants_off = ""  # until the ranks agree
        self._lookup: Lookup
        self._scope: Scope | None = None
        self._skipped_last = False  # whether the last forward of the model skipped the prefix
        self.remarks: list[str] = []
        self.is_fault = self.is_damaged = False
        self.gain = Gain()
        self.forwards_of_step = self.complete_of_step = self.trained = 0
        self._around: list[Around] = []
        self.off = structure_refusal(model, self._tops) or ways.objection(self._tops)
        if self._agreement is not None:
            self.off = self._agreement.reason(self.off)
        if self.off:
            return
        self._state = PrefixState(
            model,
            self._tops,
            self._later,
            stored=stored,
            held=ways.held,
            restore_flags=restore_flags,
            device=device,
            ignored=ways.own_attributes,
        )
        earlier = None if shallower is None else shallower._lookup
        if earlier is not None:
            earlier.shallower = None
        self._lookup = Lookup(self._state, store, spot_check=spot_check, reopen=reopen, shallower=earlier)
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
        self._ways.end()

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row, of the first class of batches; 0 before a forward that can be stored."""
        return 0 if self.off else self._lookup.row_bytes

    def is_part_of(self, tops: Sequence[nn.Module]) -> bool:
        """Whether a prefix of these modules contains this one, and is longer."""
        return len(tops) > len(self._tops) and tuple(tops[: len(self._tops)]) == self._tops

    def turn_off(self, reason: str, *, is_fault: bool = False) -> None:
        """End the use of the cache: `off` says why. Where the ranks must agree, in the next forward that may be trained on."""
        self.is_fault = self.is_fault or (is_fault and not (self.off or self._wants_off))
        if self._agreement is None:
            self.off = self.off or reason
        else:
            self._wants_off = self._wants_off or reason

    # --- the model's call -----------------------------------------------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = partial(call_of, module, args, kwargs)
        if self.off or self._scope is not None:
            return call()
        if not module.training or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            # An evaluation or a reference pass: nothing is stored or used. It may have left other weights behind.
            self._state.suspect()
            self._ways.before("complete", (), together=False)
            return call()
        began = perf_counter()
        look = self._look(args, kwargs)
        way, keys = look.way, perf_counter() - began
        if self._agreement is not None:
            way, look = self._agree(self._agreement, look, args, kwargs)
        elif way is Way.OFF:
            self.turn_off(look.reason, is_fault=look.is_fault)
        if look.batch is not None:
            self.gain.seen(look.back, way >= Way.CHECK)
        self.forwards_of_step += 1
        self.trained += 1
        self.complete_of_step += 1
        self._skipped_last = False
        if way is Way.PLAIN and look.reason:
            self._remark(look.reason)
        if way is Way.SKIP:
            return self._skip(look, call, keys)
        if way in (Way.PROVE, Way.CHECK):
            bare = partial(call_with_engine, module, args, kwargs) if self._ways.communicates else partial(module.forward, *args, **kwargs)
            return self._compare(look, way is Way.PROVE, call, bare)
        if look.kind is not None and look.rows is None and way is not Way.OFF:
            return self._complete(look.kind, look, call, keys, look.carried if way is Way.CARRY else None)
        self._ways.before("complete", (), together=True)
        return call()

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Look:
        return Look(Way.OFF, self._wants_off, is_fault=self.is_fault) if self._wants_off else self._lookup.look(args, kwargs)

    def _agree(self, agreement: Agreement, look: Look, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Way, Look]:
        """Return what all ranks do, and what this one could do."""
        while True:
            known = bool(agreement.weights)
            wishes, changed, seconds = agreement.exchange(look.way, self._state.weights or bytes(KEY_BYTES))
            self.gain.exchanged(seconds)
            if not changed:
                break
            self._state.shared = agreement.weights
            if known:
                self._lookup.shallower = None  # which has the same weights, and knows of this rank's part only
            look = self._look(args, kwargs)
        way = common_way(wishes)
        if way is Way.OFF:
            self.off, self.is_fault = agreement.fault(look.reason, look.is_fault)
        return way, look

    def _complete(self, kind: Kind, look: Look, call: Call, keys: float, carried: Replay | None = None) -> Any:
        """Run the whole model, or its part behind a shallower border, and store the rows."""
        assert look.batch is not None
        batch, forward = look.batch, self._recorder(kind, look.batch)
        before, began = None if carried is None else RandomState(self._device), perf_counter()
        rows: Rows | None = None
        self._ways.before("complete" if carried is None else "carry", () if carried is None else self._shallower, together=True)
        try:
            with self._recorded(forward):
                output = self._within(forward if carried is None else Carried(forward, carried), call)
        except CallDiffers as error:  # of the shallower border; no active layer has run yet
            assert before is not None
            before.restore()
            self._lookup.shallower = None
            self._must_not_differ(error)
            return self._complete(kind, look, call, keys)
        finally:
            if isinstance(forward, Discovery):
                plan, rows = forward.finish()
        if carried is not None:
            self._check_calls(carried)
            self._skipped_last = True
            self.gain.carried += 1
        if isinstance(forward, Discovery):
            kind.plan, kind.course = plan, forward.course
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

    def _recorder(self, kind: Kind, batch: Batch) -> Discovery | Capture:
        return Discovery(batch.rows, self._later, self._device) if kind.plan is None else Capture(kind.plan, self._device)

    def _recorded(self, forward: Discovery | Capture) -> AbstractContextManager[None]:
        if not self._ways.communicates or isinstance(forward, Capture):
            return nullcontext()
        return forward.course.recorded(self._model)

    @staticmethod
    def _check_calls(replay: Replay) -> None:
        if not replay.complete:
            raise RuntimeError(
                "the prefix cache skipped frozen layers that this forward did not call, although its arguments were those of forwards that "
                "did: the result may be wrong; allowed: smartfrz.cache.mode 'off'"
            )

    def _must_not_differ(self, error: CallDiffers) -> None:
        """Raise where a forward that has begun can't be repeated: other ranks are in it, too."""
        if self._ways.communicates:
            raise RuntimeError(
                f"prefix cache: {error}, although its arguments were the same, and a forward that has begun to gather weights can't be "
                "repeated; allowed: smartfrz.cache.mode 'off'"
            ) from error

    def _write(self, batch: Batch, rows: Rows) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        try:
            self._store.insert(batch.keys, rows.views())
        except OSError as error:
            self.turn_off(f"its rows can't be stored: {error}", is_fault=True)

    def _skip(self, look: Look, call: Call, keys: float) -> Any:
        """Run the model without its frozen layers."""
        kind, rows = look.kind, look.rows
        assert kind is not None and kind.plan is not None and rows is not None
        began = perf_counter()
        replay, before = Replay(kind.plan, rows.on_device(), self._reopen), RandomState(self._device)
        self._lookup.has_hit = True
        kind.hits += 1
        self._ways.before("skip", self._tops, together=True)
        entering = perf_counter()
        try:
            output = self._within(replay, call)
        except CallDiffers as error:  # no active layer has run yet
            before.restore()
            self._drop(kind, str(error))
            self._must_not_differ(error)
            return call()
        self._check_calls(replay)
        self._skipped_last = True
        self.complete_of_step -= 1
        self.gain.hit(keys=keys + entering - began, read=replay.passed - entering)
        return output

    def _compare(self, look: Look, first: bool, call: Call, bare: Call) -> Any:
        """Run the whole model, and compare the stored rows with it; the first time also the output without the frozen layers."""
        kind, rows, batch = look.kind, look.rows, look.batch
        assert kind is not None and kind.plan is not None and rows is not None and batch is not None
        skipped, reason = None, ""
        if first:
            replay = Replay(kind.plan, rows.on_device(), self._reopen)
            with undone(self._model, self._device):
                skipped, reason = self._probe(kind, replay, bare)
            if not reason and not replay.complete:
                reason = "without the frozen layers the model calls them differently"
        self._ways.before("complete", (), together=True)
        capture = Capture(kind.plan, self._device)
        output = self._within(capture, call)
        kind.hits = 0
        self.gain.forwards += 1
        stale = ""
        if not capture.complete:
            reason = reason or capture.reason or "the model did not call all of its frozen layers"
        elif not all(same_bits(x, y) for x, y in zip(rows.tensors, capture.rows.tensors, strict=True)):
            if look.mixed in kind.proven:
                stale = "a comparison found stored rows that differ from computed ones: the steps since the last comparison used them"
            reason = (
                "a batch composed of rows of several batches has other bits: a row depends on its neighbours"
                if look.mixed
                else "the same batch has other bits when it comes again"
            )
        elif first and not reason:
            reason = difference(output, skipped)
        if self._agreement is not None:  # what one rank has found concerns all
            stale, reason = (self._agreement.reason(x) for x in (stale, reason))
        if stale:
            self.off, self.is_damaged = stale, True
        elif reason:
            self._drop(kind, reason)
        elif first:
            kind.proven.add(look.mixed)
            of = "rows of several stored batches" if look.mixed else "a stored batch"
            self._tell(f"proven for {batch.rows} rows of {kind.plan.row_bytes:,} bytes, on {of}")
        return output

    def _probe(self, kind: Kind, replay: Replay, bare: Call) -> tuple[Any, str]:
        """Run the model without its frozen layers and without a backward. Return its output, and what it raised."""
        output, reason, course = None, "", Course()
        self._ways.before("probe", self._tops, together=True)
        try:
            with course.recorded(self._model) if self._ways.communicates else nullcontext():
                output = self._within(replay, bare)
        except Exception as error:  # placeholders can lead anywhere; the complete forward follows
            reason = f"without the frozen layers the model raises {type(error).__name__}: {error}"
            if self._ways.communicates:  # other ranks may not have raised
                course.finish_like(kind.course, self._model)
        self._ways.after_probe()
        return output, reason

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

    def _drop(self, kind: Kind, reason: str) -> None:
        kind.off, kind.plan = reason, None
        self._remark(reason)

    def _remark(self, reason: str) -> None:
        if reason not in self.remarks:
            self.remarks.append(reason)
            self._tell(f"not used for some batches: {reason}")

    @property
    def changes(self) -> int:
        """How often the weights of the prefix turned out to have changed."""
        return 0 if self.off else self._state.changes
