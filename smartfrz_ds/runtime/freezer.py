"""Changing what is frozen, and where layers are: everything is checked on all ranks, then done on all, then told.

The part of the controller that turns a decision into a layout. It is collective, in the same order on every rank.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.backends.cost import Bandwidths, PausePrediction, measure_bandwidths, predict_pause
from smartfrz_ds.backends.pipeline.protocol import Pipeline
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.activation_checkpointing import RecomputeBoundary
from smartfrz_ds.model.flops import FlopMeter, FlopTally
from smartfrz_ds.model.freeze_modules import check_tied, freeze_modules, leaving_params
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.planner.width import Width
from smartfrz_ds.signals.history import History
from smartfrz_ds.signals.policy_inputs import PolicyInputs
from smartfrz_ds.signals.snapshots import Snapshots
from smartfrz_ds.telemetry.events import WEIGHTS_ONLY, FreezeEvent
from smartfrz_ds.telemetry.run_log import RunLog
from smartfrz_ds.telemetry.speaking import Speaker

from .change import carry_out, plan_change
from .eligibility import check_order
from .guard import GuardedRun
from .intervals import Intervals
from .kept_frozen import KeptFrozen
from .missing_grad_check import GradientCheck
from .user_frozen import Restored, UserFrozen


class LayoutControl:
    """What it works on belongs to the controller, which makes it."""

    config: FreezeConfig
    step: int
    last_checkpoint: str | None
    _model: torch.nn.Module
    _backend: Backend
    _ranks: Collectives
    _layers: tuple[Layer, ...]
    _names: tuple[str, ...]
    _users: UserFrozen
    _frozen: set[str]
    _frozen_at: dict[str, int]
    _recorded: set[str]
    _log: RunLog
    _speaker: Speaker
    _history: History
    _intervals: Intervals
    _inputs: PolicyInputs
    _gradients: GradientCheck
    _recompute: RecomputeBoundary
    _kept: KeptFrozen
    _guard: GuardedRun | None
    _rebalancer: Pipeline | None
    _snapshots: Snapshots
    _flops: FlopMeter
    _tally: FlopTally
    _bandwidths: Bandwidths | None
    _predicted: PausePrediction | None
    _width: Width | None
    _profiled_together: bool
    _seconds: float
    _inside: bool  # within after_step
    _freeze_seconds: float
    _frozen_before_load: set[str] | None
    _warned_once: bool
    _warned_blind: bool
    _warned_uncuttable: bool

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen layers, in order. Layers that the user froze before are not among them."""
        return tuple(name for name in self._names if name in self._frozen)

    def rebalance(self, bounds: Sequence[int] | None = None) -> tuple[int, ...]:
        """Move layers of a pipeline to other stages now, with weights and optimizer state. Collective, at a step boundary.

        bounds: of the stages in the pipeline's list of layers, (stages + 1,), as `PipelineModule.parts`; None: those with which a step is
            fastest by the costs measured so far, where `pipeline.min_gain` is reached.
        Returns the bounds that hold then.

        Raises:
            ValueError: bounds that can't be, or no pipeline; nothing was changed.
            RuntimeError: not at a step boundary; nothing was changed.
            RanksDisagree: the ranks gave different bounds.
        """
        if self._rebalancer is None:
            raise ValueError("rebalance: this engine is no pipeline: it has no stages between which layers could move")
        self._ranks.assert_same(f"bounds {bounds} at step {self.step}", "bounds")
        if not self._backend.is_boundary():
            raise RuntimeError("rebalance only at a step boundary: not within train_batch")
        if bounds is None:
            self._rebalance(moves=True)
        elif tuple(bounds) != self._rebalancer.bounds:
            self._rebalancer.check(bounds)
            self._move(bounds, self._rebalancer.gain(bounds))
        return self._rebalancer.bounds

    def restore_bounds(self, bounds: Sequence[int] | None) -> None:
        """Bring a pipeline's stages to these bounds before a checkpoint is loaded; None: to those with which the run began. Collective.

        Raises ValueError or RuntimeError where that can't be, on every rank; nothing was changed.
        """
        assert self._rebalancer is not None
        wanted = self._rebalancer.first_bounds if bounds is None else tuple(bounds)
        if wanted != self._rebalancer.bounds:
            self._rebalancer.check(wanted)
            self._move(wanted)

    def restore_layout(self, frozen: Iterable[str]) -> None:
        """Bring the layout to this frozen set, whatever `order` says, before tensors are loaded: moments of layers that come back are
        zero. Collective, at a step boundary where the set is another than now, else RuntimeError."""
        self._note_layout()
        self._change(set(frozen), kind="restore")

    def _note_layout(self) -> None:
        """Remember what is frozen, for the record of the load that follows."""
        if self._frozen_before_load is None:
            self._frozen_before_load = set(self._frozen)

    def restore_layout_of(self, state: Mapping[str, Any], *, by_position: bool = False) -> Restored:
        """`restore_layout` for a freeze state, whoever froze a layer: the user then and not now, or the other way round. Collective.

        by_position: the optimizer's state is loaded by position, so that its groups must hold the same parameters in the same order.
        Raises ValueError where they don't, because the user froze other layers; nothing was changed.
        """
        users = state.get("user_frozen")
        if users is None:  # of a version that left such layers alone
            self.restore_layout(state["frozen"])
            return Restored()
        self._note_layout()
        left, before = set(users["left"]), set(self._users.taken)
        ours = tuple(name for name in self._names if name in left and name not in self._users.names)
        with self._taking_in(set(self._users.names) - left, self._users.groups_in(users)):
            taken = tuple(name for name in self._users.taken if name not in before)
            if by_position and (ours or taken):
                self._ranks.run_on_all_ranks(lambda: self._users.check_positions(users, ours))
            self._change({*state["frozen"], *ours}, kind="restore", anew=bool(taken))
        return Restored(taken, ours)

    def hand_back(self, names: Iterable[str]) -> None:
        """Those of these layers that are frozen, and that the user had frozen here before the start, are the user's again."""
        back = set(self._users.taken).intersection(names, self._frozen)
        if back:
            self._give_back(back)
            self._after_layout_change()

    def _give_back(self, names: Collection[str]) -> None:
        self._users.give_back(names)
        self._frozen.difference_update(names)
        for name in names:
            self._frozen_at.pop(name, None)
        self._inputs.regroup()
        self._snapshots.choose_weights(self._layers)

    @contextmanager
    def _taking_in(self, names: Collection[str], groups: Mapping[str, int] | None = None) -> Iterator[None]:
        """Around a change of the layout in which these layers, which the user froze, become this package's. Collective.

        groups: of their parameters, by name, where they are known.
        Raises ValueError where they can't train here; where the change is refused, too, they are the user's again.
        """
        if not names:
            yield
            return
        before = set(self._users.taken)

        def take() -> None:
            self._users.take_in(names, groups)
            self._frozen |= set(self._users.taken) - before
            try:
                check_tied(self._layers, self.config.tied)
                self._inputs.regroup()
            except ValueError:
                self._give_back(set(self._users.taken) - before)
                raise
            self._snapshots.choose_weights(self._layers)

        try:
            self._ranks.run_on_all_ranks(take)
            yield
        except FreezeError:
            raise
        except (ValueError, RuntimeError):
            self._give_back(set(self._users.taken) - before)
            raise
        # A step costs more where these layers train too.
        self._flops.remove()
        self._flops = FlopMeter(self._model, self._layers, self.config.tied)

    def _note_users(self, names: Collection[str], text: str) -> None:
        """Say on rank 0 what is left to the user."""
        if names and self._ranks.rank == 0:
            self._speaker.note(f"step {self.step:,}: {text.format(', '.join(sorted(names)))}")

    def _loaded(self, left: int, folder: str, *, weights_only: bool = False) -> None:
        """Record that a checkpoint was loaded into the running run. left: the step before it."""
        before, self._frozen_before_load = self._frozen_before_load, None
        changed = self._frozen ^ (self._frozen if before is None or weights_only else before)
        what = f"checkpoint {folder}" if folder else "a freeze state"
        self._record(
            FreezeEvent(
                kind="load",
                step=self.step,
                from_step=left,
                layers=self._sorted(changed),
                frozen=self.frozen,
                message=what + (WEIGHTS_ONLY if weights_only else ""),
            )
        )

    def _change(
        self, frozen: set[str], *, kind: str, about: Mapping[str, Any] | None = None, began: float | None = None, anew: bool = False
    ) -> None:
        """Bring the engine to exactly this set of frozen layers: check on all ranks, then do it on all. anew: also where it is this one."""
        start = time.perf_counter() if began is None else began
        if frozen == self._frozen and not anew:
            return
        self._kept.put_back()

        def check() -> None:
            lent = self.config.tied == "train"  # a head without weights of its own trains what it borrows
            if not any((x.numel or (lent and x.is_borrower)) and x.name not in frozen for x in self._layers):
                raise ValueError("nothing would be left to train: keep at least one layer active")
            if kind != "restore":  # what a checkpoint holds was allowed when it was saved
                check_order(self._layers, frozen, self.config.order)

        change = plan_change(
            self._backend, self._ranks, self._layers, before=self._frozen, after=frozen, leaving=self.leaving(frozen), check=check
        )
        predicted = self._predict(frozen) if kind != "restore" else None
        if predicted is not None:
            self._predicted = predicted
        try:
            if kind == "restore":  # what was kept belongs to the run as it was before
                self._backend.forget([p for layer in self._layers for p in (*layer.params, *layer.copies)])
            keep = self._keep_steps > 0 and kind != "restore"
            released, total = carry_out(change, self._backend, self._ranks, self._model, self._layers, self.config, keep=keep)
        except BaseException as error:
            raise self._broke_off(kind, error) from error
        gone, back = change.gone, change.back
        self._frozen = frozen
        for name in gone:
            self._frozen_at[name] = self.step
        for name in back:
            self._frozen_at.pop(name, None)
        self._history.forget(back)
        self._inputs.thawed(back)
        self._gradients.forget(change.thaw)
        self._after_layout_change()
        self._inputs.watch(self._snapshots.requests)
        if kind == "freeze":
            self._check_gradients()
        if self._guard is not None:
            self._guard.guard.thawed(back)
            if kind == "freeze" and not self._guard.froze(self._sorted(gone), self.step):
                self._warn_blind(f"before the freeze of step {self.step}, which is not watched therefore")
        moved = self._of_all_stages(released.moved_bytes)
        seconds = time.perf_counter() - start
        self._freeze_seconds += seconds
        if not self._inside:  # else `after_step` counts it
            self._seconds += seconds
        if kind != "restore":
            if self._rebalancer is not None:
                self._rebalancer.due = True
            event = FreezeEvent(
                kind="freeze" if kind == "freeze" else "thaw",
                step=self.step,
                layers=self._sorted(gone or back),
                frozen=self.frozen,
                bytes_released=released.bytes,
                bytes_released_total=total,
                seconds=seconds,
                predicted_seconds=predicted.seconds if predicted else 0.0,
                moved_bytes=moved,
                **(about or {}),
            )
            self._record(event)
            if not self._inside:
                self._rebalance_if_due()

    def _rebalance_if_due(self) -> None:
        if self._rebalancer is not None and self._rebalancer.due:
            self._rebalance(moves=self.config.pipeline.rebalance == "on_freeze")

    def _rebalance(self, *, moves: bool) -> None:
        """Look at the stages with what is frozen now. moves: whether layers may move."""
        assert self._rebalancer is not None
        move, self._width = self._rebalancer.decide(self._measured_bandwidths(), moves=moves)
        if self._width is not None:
            self._speaker.note(f"step {self.step:,}: {self._width.advice(self._checkpoint_folder)}")
        if move is not None and move.problem:
            self._warn(move.problem)
        elif move is not None:
            try:
                self._rebalancer.check(move.bounds)
            except Exception as error:  # a layer's constructor, for example: the run goes on as it is
                self._warn(f"the layers stay where they are: {error}")
            else:
                self._move(move.bounds, move.gain)

    def _move(self, bounds: Sequence[int], gain: float | None = None) -> None:
        """Move layers to these bounds, after `Pipeline.check`. gain: how many times faster a step is predicted to be; None: it is done to
        load a checkpoint, which is no event."""
        assert self._rebalancer is not None
        start, old = time.perf_counter(), self._rebalancer.bounds
        try:
            moved = self._rebalancer.move(bounds)
        except BaseException as error:
            raise self._broke_off("re-balance", error) from error
        for layer in self._layers:
            if layer.name in self._frozen:
                freeze_modules(layer, self.config.frozen_mode, self.config.tied)
        names = {p: name for name, p in self._model.named_parameters()}
        self._gradients.moved(self._model, names, self._backend.trained())
        if not self._profiled_together:
            self._flops.remove()
            self._flops = FlopMeter(self._model, self._layers, self.config.tied)
        self._snapshots.choose_weights(self._layers)
        self._after_layout_change()
        self._gradients.record_start(self._backend.trained, stage_follows=True)
        seconds = time.perf_counter() - start
        self._freeze_seconds += seconds
        if not self._inside:
            self._seconds += seconds
        if gain is None:
            return
        event = FreezeEvent(
            kind="rebalance",
            step=self.step,
            frozen=self.frozen,
            seconds=seconds,
            moved_bytes=moved,
            bounds=self._rebalancer.bounds,
            gain=gain,
            message=f"stages {list(old)} became {list(self._rebalancer.bounds)}",
        )
        self._record(event)

    def _broke_off(self, kind: str, error: BaseException) -> FreezeError:
        last = self.last_checkpoint
        way = f"go on from the last complete checkpoint, {last}" if last else "no checkpoint was saved yet"
        return FreezeError(f"a {kind} at step {self.step} broke off half-way and this run can't be trusted any more; {way}: {error}")

    def leaving(self, frozen: set[str]) -> tuple[Parameter, ...]:
        """The parameters that are out of the optimizer when exactly these layers are frozen."""
        return leaving_params([x for x in self._layers if x.name in frozen], self._layers, self.config.tied)

    def _uncuttable(self, frozen: set[str]) -> str:
        """Why the optimizer's state doesn't let these layers be the frozen ones; "" where it does. Collective, and warns once."""
        leaving = [p for p in self.leaving(frozen) if p not in self._backend.frozen]
        why = next((text for text in self._ranks.gather_objects(self._backend.uncuttable(leaving)) if text), "")
        if why and not self._warned_uncuttable:
            self._warned_uncuttable = True
            self._warn(f"the policy's freezes are left out, and training goes on: {why}")
        return why

    def _measured_bandwidths(self) -> Bandwidths:
        if self._bandwidths is None:
            self._bandwidths = measure_bandwidths(self._backend.device)
        return self._bandwidths

    @property
    def _checkpoint_folder(self) -> str:
        return str(Path(self.last_checkpoint).parent) if self.last_checkpoint else "CHECKPOINT"

    def _predict(self, frozen: set[str]) -> PausePrediction:
        own = predict_pause(self._backend, self.leaving(frozen), self._measured_bandwidths(), keep=self._keep_steps > 0)
        if not self._backend.is_pipeline:
            return own
        # Each stage has its own: all wait for the slowest.
        seconds = -self._ranks.all_reduce_min([-own.seconds])[0]
        return PausePrediction(seconds=seconds, moved_bytes=self._of_all_stages(own.moved_bytes), cost=own.cost)

    def _of_all_stages(self, moved: int) -> int:
        """Bytes that moved within the replicas of this stage, added up over the stages of a pipeline. Collective there."""
        if not self._backend.is_pipeline:
            return moved
        return int(self._ranks.all_reduce_sum([float(moved) if self._backend.is_sampling_rank else 0.0])[0])

    def _after_layout_change(self) -> None:
        self._recompute.update(self._frozen)
        self._kept.follow(self._backend.frozen, {p: layer.name for layer in self._layers for p in (*layer.params, *layer.copies)})
        self._backend.on_layout_changed(self._layers, self._frozen)
        self._recorded = {layer.name for layer in self._layers if layer.name not in self._frozen and layer.numel and layer.kind != "head"}
        self._tally.set_frozen(self._frozen)
        self._snapshots.compile([layer.position for layer in self._layers if layer.name in self._recorded])

    @property
    def _keep_steps(self) -> int:
        """Steps for which released state is kept: what the user asked for, or what the guard needs to take a freeze back."""
        return max(self._intervals.keep_state, self._intervals.guard_window)

    def _forget_old_state(self) -> None:
        old = [name for name, step in self._frozen_at.items() if self.step - step > self._keep_steps]
        for layer in self._layers:
            if layer.name in old:
                self._backend.forget([*layer.params, *layer.copies])

    # --- small things ---------------------------------------------------------------------------------------------------------

    def _count_step(self) -> None:
        """Count a step's FLOPs, and say once where other code had switched frozen layers on."""
        intrusion = self._kept.after_step()
        if intrusion is None:
            self._tally.step()
            return
        if intrusion.bytes:  # in this step nothing was saved there
            self._tally.set_frozen(self._frozen.difference(intrusion.layers))
        self._tally.step()
        self._tally.set_frozen(self._frozen)
        if self._kept.first_time():
            self._warn(intrusion.text(self.step))

    def _check_gradients(self) -> None:
        self._gradients.arm(self._backend.trained(), check=True)

    def _check_late(self, module: torch.nn.Module) -> None:
        """Check this step, in whose forward `module` is about to run."""
        self._check_gradients()
        self._gradients.runs(module)

    def _warn_blind(self, when: str) -> None:
        if not self._warned_blind and self.config.guard is not None:
            self._warned_blind = True
            metric = self.config.guard.metric
            self._warn(f"the guard has seen no {metric!r} {when}: it takes engine.backward(loss), or the controller's observe({metric}=…)")

    def _sorted(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=self._names.index))

    def _record(self, event: FreezeEvent) -> None:
        self._log.add(event)
        self._speaker.event(event, by_policy=self._inside)

    def _warn(self, text: str, *, once: bool = False) -> None:
        if once and self._warned_once:
            return
        self._warned_once = self._warned_once or once
        self._record(FreezeEvent(kind="warning", step=self.step, frozen=self.frozen, message=text))
        if self._ranks.rank == 0:
            warnings.warn(f"smartfrz: {text}", RuntimeWarning, stacklevel=3)
