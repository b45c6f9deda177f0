"""The loop: signals, the policy on rank 0, one decision on all ranks, the freezer, events. And freeze and thaw by the user.

Everything here runs at step boundaries and is collective in the same order on every rank: what a rank does depends only on its step
count, on settings whose digest was compared at the start, and on what rank 0 broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.hooks import RemovableHandle

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.backends.cost import PausePrediction
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.runtime.observers.protocol import LayoutChange, Listeners
from smartfrz_ds.runtime.rules.eligibility import check_known
from smartfrz_ds.runtime.rules.intervals import Intervals
from smartfrz_ds.signals.lr_forecast import current_lr
from smartfrz_ds.telemetry.speaking import scheduler_name

from .assembly import assemble
from .former_names import FormerNames
from .freeze_state import FreezeState
from .guarded_attributes import GuardedAttributes
from .run_report import Report as Report
from .run_report import report_of


class Controller(GuardedAttributes, FormerNames):
    """Freezes the layers of one engine while it trains. Created by `initialize` and `attach` (`engine.smartfrz`). Collective.

    Raises:
        ValueError: The settings do not fit the model or the engine.
        RanksDisagree: The ranks differ in settings, package version or layers.
    """

    #: how to resume a run that failed, for error messages; the checkpoint's path follows
    resumed_by = "load_checkpoint resumes from"

    def __init__(
        self,
        model: torch.nn.Module,
        backend: Backend,
        config: FreezeConfig,
        *,
        scheduler: Any = None,
        monitor: Any = None,
        probe_batch: Any = None,
        version: str = "",
        defer_policy: bool = False,
    ) -> None:
        self.config, self.released = config, False
        parts = assemble(
            model,
            backend,
            config,
            scheduler=scheduler,
            monitor=monitor,
            probe_batch=probe_batch,
            version=version,
            defer_policy=defer_policy,
        )
        run = self._run = parts.run
        self._policy_stage, self._freezer, self._observers, self._stages = parts.policy, parts.freezer, parts.observers, parts.stages
        self._every_step, self._time = Listeners(parts.observers), run.time
        self._freeze_state, self._recording = parts.freeze_state, parts.recording
        self._guard, self._moves, self._readers, self._cache = parts.guard, parts.moves, parts.readers, parts.cache
        self._users, self._kept_active, self._kept, self._tally = parts.users, parts.kept_active, parts.kept, parts.tally

        for text in backend.warnings:
            run.journal.warn(text)
        self._policy_stage.warn_if_never()
        self._freezer.tell(LayoutChange(kind="start", frozen=frozenset()))
        speaker = run.journal.speaker
        speaker.length_from = scheduler_name(scheduler) if config.total_steps == "auto" else "smartfrz.total_steps"
        if not defer_policy:
            speaker.start()

    # --- what a user sees -----------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Successful optimizer steps since attach, or since the run began, after a resume."""
        return self._run.step

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None: unknown."""
        return self._run.total_steps

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, front to back, the head too."""
        return self._run.names

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen layers, in order. Layers that the user froze before are not among them."""
        return self._run.frozen

    @property
    def next_stage(self) -> int | None:
        """The step that ends in the next freezing stage, as far as the policy has planned; None: there is no further one."""
        begin = self.step + 1
        regular = self.intervals.first_from(begin) + 1
        end = regular if self.total_steps is None else min(regular, self.total_steps)
        return next((step for step in range(begin, end) if self._policy_stage.is_stage(step)), None)

    def active_weights(self, since: int | None = None) -> tuple[str, ...]:
        """Name the parameters that train, as the model's `named_parameters` does (in a pipeline, those of this stage). Not collective.

        Args:
            since: A step; parameters of layers that froze after it are named too, since they have moved since then. A copy of the model
                that was synchronized at this step, as in a rollout engine, is up to date after these have been sent to it.
        """
        return self._run.active_weights(since)

    @property
    def intervals(self) -> Intervals:
        """The settings that count steps, as numbers of steps; provisional until the length of the run is known (`set_schedule`)."""
        return self._run.intervals

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze these layers now. Collective, at a step boundary, with the same names on every rank.

        A layer that the user froze before the start stays the user's; the log says so.

        Raises:
            ValueError: A name is not a layer's, or `order` or `keep_active` forbids the set.
            RuntimeError: This is not a step boundary, or `detach` was called.
            RanksDisagree: The ranks named different layers.
        """
        self._check_attached("freeze")
        wanted, state = _as_set(names), self._run.state
        self._run.ranks.assert_same(f"freeze {sorted(wanted)} at step {state.step} on top of {self.frozen}", "layers to freeze")
        theirs = wanted.intersection(self._users.names)
        check_known(self._run.layers, wanted - theirs, "freeze")
        blocked = sorted((wanted - theirs) & self._kept_active)
        if blocked:
            raise ValueError(f"freeze: {blocked} stay active by smartfrz.keep_active {list(self.config.keep_active)}")
        self._run.journal.note_layers(theirs, "freeze: already frozen by the user: {}")
        if self._freezer.change(state.frozen | (wanted - theirs), kind="freeze") and self._moves is not None:
            self._moves.if_due()

    def thaw(self, names: Iterable[str]) -> None:
        """Let these layers train again. Collective, at a step boundary, with the same names on every rank.

        Within `keep_state` steps of its freeze a layer's optimizer state comes back exactly; later its moments start at zero, with
        the bias correction of a new parameter, and in half precision its master weight comes back rounded.
        A layer of which the user froze everything before the start trains from now on: its parameters join the groups of the parameters of
        the same names in the nearest layer. Where the user froze a part of a layer, that part stays frozen (user_frozen.py).

        Raises:
            ValueError: As `freeze`. Also for a layer that the user froze where such a layer cannot train: in a pipeline, under FSDP1,
                quantized weights, a policy that sets learning rates of single layers.
            RuntimeError, ChangeUndone, FreezeError: As `freeze`.
        """
        self._check_attached("thaw")
        wanted, state = _as_set(names), self._run.state
        self._run.ranks.assert_same(f"thaw {sorted(wanted)} at step {state.step} out of {self.frozen}", "layers to thaw")
        theirs = wanted.intersection(self._users.names)
        check_known(self._run.layers, wanted - theirs, "thaw")
        for name, params in self._users.partly(wanted - state.frozen).items():
            self._run.journal.note_layers(params, f"thaw: {name} is active; a part of it was frozen by the user and stays so: {{}}")
        if self._freezer.change(state.frozen - wanted, kind="thaw", adopt=theirs) and self._moves is not None:
            self._moves.if_due()

    def rebalance(self, bounds: Sequence[int] | None = None) -> tuple[int, ...]:
        """Move layers of a pipeline to other stages now, with weights and optimizer state. Collective, at a step boundary.

        Args:
            bounds: (stages + 1,), as `PipelineModule.parts`; None: the fastest by the costs so far, if they reach `pipeline.min_gain`.

        Returns:
            The bounds afterwards.

        Raises:
            ValueError: The bounds are not possible, or the engine is not a pipeline; nothing was changed.
            RuntimeError: This is not a step boundary; nothing was changed.
            RanksDisagree: The ranks gave different bounds.
            ChangeUndone: It failed on some rank after it had started, with bounds given; every rank is back at the previous bounds.
            FreezeError: It failed and could not be undone; the engine state is inconsistent.
        """
        if self._moves is None:
            raise ValueError("rebalance() requires a PipelineModule engine")
        return self._moves.rebalance(bounds)

    def drop_gradients(self) -> None:
        """Forget gradients of the model that no step has used, where another model's backward went through it (a GAN's discriminator).

        Call it on every rank, between steps. Under ZeRO-1 and 2 `zero_grad` leaves them, and the next step would use them.
        """
        self.backend.drop_gradients()

    def on_layout_change(self, fn: Callable[[tuple[str, ...]], object]) -> RemovableHandle:
        """Call `fn` on this rank after each change of the layout: freeze, thaw, load, move of layers between pipeline stages.

        Weights may lie elsewhere in memory then (`data_ptr()`): record CUDA graphs again, send shared weights again. Without a callback
        these are refused. An error in `fn` leaves the change in force; RuntimeError follows on every rank, after all callbacks.

        Args:
            fn: Takes the names of the frozen layers, in order.

        Returns:
            A handle; its `remove()` ends the calls.
        """
        return self._readers.add(fn)

    def predict_pause(self, names: Iterable[str], *, action: Literal["freeze", "thaw"] = "freeze") -> PausePrediction:
        """Predict what freezing or thawing these layers now would cost. Changes nothing.

        Collective: the first call measures the cluster's bandwidths. The bytes are exact, the time is an estimate.

        Raises:
            ValueError: A name is not a layer's.
        """
        wanted, frozen = _as_set(names), self._run.state.frozen
        theirs = wanted.intersection(self._users.names)
        check_known(self._run.layers, wanted - theirs, "predict_pause")
        if action == "freeze":
            return self._freezer.predict(frozen | (wanted - theirs))
        self._users.adopt(theirs)
        try:
            return self._freezer.predict(frozen - wanted)
        finally:
            self._users.disown(theirs)

    def set_schedule(self, *, scheduler: Any = None, total_steps: int | None = None, told_by: str = "set_schedule()") -> None:
        """Set what was unknown at `attach(…, defer_policy=True)`, and build the policy. Collective, once, before the first step.

        The policy's state in a checkpoint that was loaded in the meantime is loaded now.

        Args:
            scheduler: The learning-rate scheduler.
            total_steps: Steps of the whole run; None takes the scheduler's. A number at `smartfrz.total_steps` takes precedence.
            told_by: The source of `total_steps`, for the line at the start.

        Raises:
            ValueError: The policy refuses the run.
        """
        if self._policy_stage.deferred:
            self._set_schedule(scheduler, total_steps, told_by)
            self.begin()

    def _set_schedule(self, scheduler: Any = None, total_steps: int | None = None, told_by: str = "set_schedule()") -> None:
        policy = self._policy_stage
        if policy.set_schedule(scheduler, total_steps):
            self._run.journal.speaker.length_from = told_by if total_steps else scheduler_name(scheduler)
        for observer in self._observers:
            observer.on_schedule()
        policy.load_policy_state()
        policy.warn_if_never()
        self._run.journal.speaker.start()

    def begin(self) -> None:
        """Make the changes that the policy has for the moment before the first step. Collective; the entry points call it.

        Raises: as `freeze`.
        """
        if not self.released:
            self._stages.begin()

    def detach(self) -> None:
        """Make every layer trainable and remove all hooks; once. The engine must not be trained any further, but it can be saved."""
        if self.released:
            return
        self.released = True
        for observer in self._observers:
            observer.remove()
        self._freezer.restore_trainable()

    def observe(self, **metrics: float) -> None:
        """Report metrics of the run (`observe(loss=0.3)`). The newest value of each goes into the log."""
        values = {name: float(value) for name, value in metrics.items()}
        self._run.metrics.update(values)
        with self._time:
            for observer in self._observers:
                observer.observe(values)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The newest value of each observed metric."""
        return dict(self._run.metrics)

    def report(self) -> Report:
        """Return where the run stands, as this rank sees it."""
        return report_of(
            self._run,
            saved=self._tally.saved_fraction,
            predicted=self._freezer.predicted,
            policy_note=self._policy_stage.note,
            width_note="" if self._moves is None else self._moves.note,
            cache={} if self._cache is None else self._cache.facts(),
            user_frozen=self._users.names,
        )

    # --- for the package: engines, checkpoints, integrations ------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        """The engine's inside."""
        return self._run.backend

    @property
    def freeze_state(self) -> FreezeState:
        """What checkpoints save and load."""
        return self._freeze_state

    @property
    def ranks(self) -> Collectives:
        """All processes of the run."""
        return self._run.ranks

    @property
    def last_checkpoint(self) -> str | None:
        """The folder of the last complete checkpoint that was saved or loaded."""
        return self._run.last_checkpoint

    @last_checkpoint.setter
    def last_checkpoint(self, folder: str | None) -> None:
        self._run.last_checkpoint = folder

    def restore_flags(self) -> None:
        """Switch frozen parameters off again that other code has switched on (`requires_grad`); before a checkpoint, for example."""
        self._kept.restore_flags()

    def state_dict(self) -> dict[str, Any]:
        """Return the freeze state: numbers, names, and on rank 0 the history's tensors."""
        return self._freeze_state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a freeze state: brings the layout to its frozen set, then everything else. Collective, at a step boundary.

        Raises:
            ValueError: The state is of another model; nothing is changed.
        """
        self._freeze_state.load_state_dict(state)

    # --- the loop -------------------------------------------------------------------------------------------------------------

    def record_loss(self, loss: Any) -> None:
        """Record a micro-batch's loss, as it goes into backward."""
        with self._time:
            for observer in self._every_step.record_loss:
                observer.record_loss(loss)

    def before_step(self) -> None:
        """Call this on every rank after the last micro-batch of a step, before the optimizer.

        Raises:
            MissingGradients: The last freeze cut off an active layer's gradients. Raised once per freeze.
        """
        with self._time:
            if self._policy_stage.deferred:
                self._set_schedule()  # in the middle of a step: changes before the first step come after it
            # A scheduler, or a load, of the user's comes after `after_step`.
            self._run.state.lr = current_lr(self._run.backend.base_optimizer())
            for observer in self._every_step.before_step:
                observer.before_step()

    def step_skipped(self) -> None:
        """Call this where the optimizer skipped a step (overflow). The step, its loss and its gradients are not counted."""
        with self._time:
            for observer in self._every_step.step_skipped:
                observer.step_skipped()

    def after_step(self) -> None:
        """Call this on every rank after every successful optimizer step."""
        run = self._run
        with self._time.after_step:
            if self._policy_stage.deferred:  # where the caller did not
                self._set_schedule()
            run.state.count_step(current_lr(run.backend.base_optimizer()))
            for observer in self._every_step.after_step:
                observer.after_step()
            if self._policy_stage.is_stage(run.state.step):
                self._stages.hold(self._guard)
                for observer in self._observers:
                    observer.stage_passed()
            if self._moves is not None:
                self._moves.if_due()
            for observer in self._every_step.step_ended:
                observer.step_ended()

    def _check_attached(self, call: str) -> None:
        if self.released:
            raise RuntimeError(
                f"{call}: this controller was released, and no longer acts on its engine; allowed: attach again, and {call} with the new "
                "controller"
            )


def _as_set(names: Iterable[str]) -> set[str]:
    return {names} if isinstance(names, str) else set(names)
