"""Adapters that let the package's senses and checks watch a run's steps, each as one `StepObserver`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from smartfrz_ds.model.activation_checkpointing import RecomputeBoundary
from smartfrz_ds.model.flops import FlopMeter, FlopTally, chain_profile
from smartfrz_ds.model.forward_mode import ForwardMode
from smartfrz_ds.model.order_check import OrderCheck
from smartfrz_ds.runtime.policy_stage import PolicyStage
from smartfrz_ds.runtime.rules.eligibility import recorded
from smartfrz_ds.runtime.run_context import RunContext
from smartfrz_ds.signals.history import History
from smartfrz_ds.signals.snapshots import Snapshots
from smartfrz_ds.telemetry.status import RunStatus

from .kept_frozen import Intrusion, KeptFrozen
from .missing_grad_check import GradientCheck
from .protocol import LayoutChange, StepObserver


class StatusLines(StepObserver):
    """The lines of the log between the events. First of all after a step, and last."""

    def __init__(self, run: RunContext, tally: FlopTally) -> None:
        self._run, self._tally = run, tally
        log = run.journal.log
        self.status = RunStatus(log, run.backend, run.ranks, run.layers, run.intervals.status_interval)
        self.status.outcome = run.journal.speaker.outcome

    def on_schedule(self) -> None:
        self.status.interval = self._run.intervals.status_interval

    def record_loss(self, loss: Any) -> None:
        self.status.loss(loss)

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.status.tell(metrics)

    def step_skipped(self) -> None:
        self.status.skipped()

    def after_step(self) -> None:
        self.status.begin(self._run)

    def step_ended(self) -> None:
        run = self._run
        if self.status.is_due(run.state.step, run.total_steps):
            self.status.write(run, own_seconds=run.time.seconds, lr=run.state.lr, saved=self._tally.saved_fraction)
        self.status.end()

    def state_dict(self) -> dict[str, Any]:
        return {"status": self.status.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.status.restart(state.get("status"))

    def reset(self) -> None:
        self.status.restart()


class OrderWatch(StepObserver):
    """Compares the order of the layers in the first forward, then removes its hooks."""

    def __init__(self, run: RunContext) -> None:
        self._check = OrderCheck(run.model, run.layers, time=run.time)

    def remove(self) -> None:
        self._check.remove()


class RecomputeWatch(StepObserver):
    """Keeps the boundary behind the frozen prefix open for recomputation."""

    def __init__(self, boundary: RecomputeBoundary) -> None:
        self._boundary, self._removed = boundary, False

    def on_layout_change(self, change: LayoutChange) -> None:
        self._boundary.update(change.frozen)

    def state_dict(self) -> dict[str, Any]:
        return {"recompute": self._boundary.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self._removed:
            self._boundary.load_state_dict(state.get("recompute", {}))

    def remove(self) -> None:
        self._removed = True
        self._boundary.remove()


class FlagWatch(StepObserver):
    """Keeps frozen parameters off, whatever other code does to `requires_grad`; says it once.

    cost: what other code has cost in the last step, None where it did nothing.
    """

    def __init__(self, run: RunContext, kept: KeptFrozen) -> None:
        self._run, self._kept = run, kept
        self.cost: Intrusion | None = None

    def after_step(self) -> None:
        self.cost = self._kept.after_step()
        if self.cost is not None and self._kept.first_time():
            self._run.journal.warn(self.cost.text(self._run.state.step))

    def on_layout_change(self, change: LayoutChange) -> None:
        self._kept.follow(self._run.backend.frozen, {p: x.name for x in self._run.layers for p in (*x.params, *x.copies)})

    def remove(self) -> None:
        self._kept.remove()


class EngineLayout(StepObserver):
    """Adapts the parts of the engine outside of its optimizer when the layout changes."""

    def __init__(self, run: RunContext) -> None:
        self._run = run

    def on_layout_change(self, change: LayoutChange) -> None:
        if change.kind in ("start", "return"):  # the others did it within their transaction
            self._run.backend.on_layout_changed(self._run.layers, change.frozen)


class FlopCount(StepObserver):
    """Measures the FLOPs of a step in the first forward, and counts the savings of freezing.

    `intruded` returns the cost in the last step of other code that switched frozen layers on (`FlagWatch.cost`).
    """

    def __init__(self, run: RunContext, tally: FlopTally, intruded: Callable[[], Intrusion | None]) -> None:
        self._run, self._tally, self._intruded = run, tally, intruded
        self._meter = self._measure()
        self._shared = False  # in a pipeline: whether the stages have told each other
        self._said = False  # that they are estimated

    def _measure(self) -> FlopMeter:
        return FlopMeter(self._run.model, self._run.layers, self._run.config.tied, self._run.time)

    def after_step(self) -> None:
        if self._run.backend.is_pipeline:
            if not self._shared:
                self._share()
        elif self._meter.profile is not None and self._tally.profile is not self._meter.profile:
            self._tally.measured(self._meter.profile)
        if self._meter.estimated and not self._said:
            self._said = True
            self._run.journal.note(f"FLOPs: {self._meter.estimated}")
        cost, frozen = self._intruded(), self._run.state.frozen
        if cost is not None and cost.bytes:  # in this step nothing was saved there
            self._tally.set_frozen(frozen.difference(cost.layers))
        self._tally.step()
        if cost is not None:
            self._tally.set_frozen(frozen)

    def _share(self) -> None:
        """In a pipeline each rank has measured its own stage, in the step that has just passed. Collective, once."""
        run, profile = self._run, self._meter.profile
        self._shared = True
        self._meter.remove()
        none = [0.0] * len(run.layers)
        own = none if profile is None else list(profile.forward)
        mine = none if profile is None else [float(bool(x.modules or x.borrowed)) for x in run.layers]
        forward, measured = run.ranks.all_reduce_sum(own), run.ranks.all_reduce_sum(mine)
        # A stage that was frozen from the first step on (a resume) has measured nothing: its weights stand for it. An embedding that was
        # looked at costs nothing.
        seen = [(flops, x.numel) for flops, there, x in zip(forward, measured, run.layers, strict=True) if there and flops]
        a_weight = sum(flops for flops, _ in seen) / max(1, sum(numel for _, numel in seen)) if seen else 2.0
        costs = [f if there else a_weight * x.numel for f, there, x in zip(forward, measured, run.layers, strict=True)]
        self._tally.measured(chain_profile(costs))

    def on_layout_change(self, change: LayoutChange) -> None:
        # A step costs more where layers that the user froze train too; other modules are here after a move.
        if change.adopted or (change.kind == "move" and not self._shared):
            self._meter.remove()
            self._meter = self._measure()
        self._tally.set_frozen(change.frozen)

    def state_dict(self) -> dict[str, Any]:
        return {"flops": [self._tally.whole, self._tally.done]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tally.whole, self._tally.done = state["flops"]

    def reset(self) -> None:
        self._tally.whole = self._tally.done = 0.0

    def remove(self) -> None:
        self._meter.remove()


class GradientWatch(StepObserver):
    """Checks the step after a freeze: does every active parameter still get a gradient?"""

    def __init__(self, run: RunContext, policy: PolicyStage, mode: ForwardMode) -> None:
        self._run, self._policy, self._mode = run, policy, mode
        names = self._names()
        everywhere = run.ranks.union(names.values()) if run.backend.is_pipeline else None
        self._check = GradientCheck(
            run.model, names, run.ranks, everywhere, mode=mode, doubt=run.config.gradient_check, warn=run.journal.warn, time=run.time
        )

    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {p: name for name, p in self._run.model.named_parameters()}

    def check_late(self, module: torch.nn.Module) -> None:
        """Check this step, in whose forward `module` is about to run."""
        self._check.arm(self._run.backend.trained(), check=True)
        self._check.runs(module)

    def on_schedule(self) -> None:
        self._record(stage_follows=self._policy.is_stage(self._run.state.step + 1))

    def before_step(self) -> None:
        if self._check.armed:
            backend = self._run.backend
            self._check.saw(backend.gradients_now())
            self._check.before_step(backend.trained, self._run.state.frozen_in_order)

    def step_ended(self) -> None:
        self._record(stage_follows=self._policy.is_stage(self._run.state.step + 1))

    def on_layout_change(self, change: LayoutChange) -> None:
        self._check.forget(change.thaw)
        if change.kind == "freeze":
            self._check.arm(self._run.backend.trained(), check=True)
        elif change.kind == "move":
            self._check.moved(self._run.model, self._names(), self._run.backend.trained())
            self._record(stage_follows=True)
        elif change.kind == "start":
            self._record(stage_follows=False)

    def _record(self, *, stage_follows: bool) -> None:
        self._check.record_start(self._run.backend.trained, stage_follows=stage_follows)

    def remove(self) -> None:
        self._check.disarm()
        self._mode.remove()


class KeptState(StepObserver):
    """Drops the released state that is held back for a thaw, once it is older than `keep_steps`."""

    def __init__(self, run: RunContext) -> None:
        self._run = run

    def after_step(self) -> None:
        run = self._run
        if not run.state.frozen_at or not (keep := run.keep_steps):
            return
        old = [name for name, step in run.state.frozen_at.items() if run.state.step - step > keep]
        for layer in run.layers if old else ():
            if layer.name in old:
                run.backend.forget([*layer.params, *layer.copies])


class Recording(StepObserver):
    """Takes snapshots of the active layers, and keeps their recent history on rank 0."""

    def __init__(self, run: RunContext, policy: PolicyStage, snapshots: Snapshots, history: History) -> None:
        self._run, self._policy, self.snapshots, self.history = run, policy, snapshots, history
        self._recorded: frozenset[str] = frozenset()

    def after_step(self) -> None:
        run = self._run
        if run.state.step % run.intervals.snapshot_interval or not self._policy.watches:
            return
        values = self.snapshots.take()
        if values is not None:
            of_layers = values.unbind()
            rows = {layer.name: of_layers[layer.position] for layer in run.layers if layer.name in self._recorded}
            self.history.record(run.state.step, self._policy.inputs.lr_spent(run.state.lr_spent), rows)

    def on_layers_changed(self) -> None:
        self.snapshots.choose_weights(self._run.layers)

    def on_layout_change(self, change: LayoutChange) -> None:
        self.history.forget(change.back)
        if change.kind == "move":
            self.snapshots.choose_weights(self._run.layers)
        self._recorded = recorded(self._run.layers, change.frozen)
        self.snapshots.compile([layer.position for layer in self._run.layers if layer.name in self._recorded])

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict(), "sample": self._sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Other weights don't continue these.
        same = state.get("sample", self._sample) == self._sample
        self.history.load_state_dict(state["history"] if same else {})

    @property
    def _sample(self) -> list[int]:
        return [self._run.config.sample_size, self._run.config.seed]

    def reset(self) -> None:
        self.history.load_state_dict({})
