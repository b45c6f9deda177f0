"""The loop: snapshots, the policy on rank 0, one decision on all ranks, the backend, events. And freeze/thaw by hand.

Everything here runs at step boundaries and is collective in the same order on every rank: what a rank does depends only on its step
count, on settings whose digest was compared at the start, and on what rank 0 broadcasts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.backends.cost import Bandwidths, PausePrediction
from smartfrz_ds.config.settings import FreezeConfig, digest
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.activation_checkpointing import RecomputeBoundary
from smartfrz_ds.model.flops import FlopMeter, FlopTally, chain_profile
from smartfrz_ds.model.forward_mode import ForwardMode
from smartfrz_ds.model.freeze_modules import check_tied, thaw_modules
from smartfrz_ds.model.keep_active import keep_active, names_inside
from smartfrz_ds.model.order_check import OrderCheck
from smartfrz_ds.model.view import View, layer_infos
from smartfrz_ds.planner.width import Width
from smartfrz_ds.policies.base import Decision
from smartfrz_ds.signals.history import History
from smartfrz_ds.signals.lr_forecast import RemainingLr, current_lr, total_steps_of
from smartfrz_ds.signals.policy_inputs import PolicyInputs, RunInfo
from smartfrz_ds.signals.snapshots import Snapshots
from smartfrz_ds.telemetry.events import FreezeEvent
from smartfrz_ds.telemetry.run_log import RunLog
from smartfrz_ds.telemetry.speaking import Speaker, scheduler_name
from smartfrz_ds.telemetry.status import RunStatus

from .eligibility import allowed, candidates, check_known
from .freezer import LayoutControl
from .guard import Guard, GuardedRun
from .guarded_attributes import GuardedAttributes
from .intervals import Intervals, resolve, why_never
from .kept_frozen import KeptFrozen
from .missing_grad_check import GradientCheck
from .policy_stage import broadcast_decision, build_policy, decide
from .user_frozen import UserFrozen, whole_numel


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where a run stands.

    step: successful optimizer steps since attach (or since the run began, after a resume).
    layers, frozen: names, in order; among the frozen ones are not those that the user froze.
    user_frozen: layers that the user froze before the start and has not thawed by name since.
    events: what has happened, oldest first.
    optimizer_bytes: live bytes of optimizer state and separate master weights on this rank.
    plugin_seconds: time spent in this package's hooks on this rank, the freezes themselves included.
    freeze_seconds: the part of it that went into freezes, thaws and moves of layers.
    saved_flops_fraction: share of the training FLOPs (forward and backward, all steps so far) that freezing has saved.
    predicted_pause: what was predicted just before the last freeze, None before the first one.
    policy_note: what the policy says of its plan as a whole (rank 0), empty where it has none.
    width_note: in a pipeline whose active part fits fewer stages: how much faster fewer stages with more replicas would be, and how to get
        there; else empty.
    log_path: the log of this controller (rank 0), empty where there is none. A second engine beside a living one with the same
        `smartfrz.log_path` writes to a file of its own.
    outcome: one sentence: what froze so far, or why nothing did (on rank 0 with the policy's reasons).
    """

    step: int
    layers: tuple[str, ...]
    frozen: tuple[str, ...]
    events: tuple[FreezeEvent, ...]
    optimizer_bytes: int
    plugin_seconds: float
    freeze_seconds: float
    saved_flops_fraction: float
    predicted_pause: PausePrediction | None = None
    policy_note: str = ""
    width_note: str = ""
    user_frozen: tuple[str, ...] = ()
    log_path: str = ""
    outcome: str = ""


class Controller(GuardedAttributes, LayoutControl):
    """Freezes the layers of one engine while it trains. `engine.smartfrz` is one.

    Made by `initialize` and `attach`; collective. Raises ValueError for settings that don't fit the model or the engine, and
    `RanksDisagree` where the ranks don't have the same settings, package version and layers.
    """

    #: how a run that broke off goes on, for error messages: what stands before the checkpoint's path
    resumed_by = "load_checkpoint goes on from"

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
        later: bool = False,
    ) -> None:
        self.config = config
        self._model = model
        self._backend = backend
        self._ranks = Collectives(backend.device)
        self._layers = backend.find_layers(model, config.layers)
        check_tied(self._layers, config.tied)
        self._names = tuple(layer.name for layer in self._layers)
        self._users = UserFrozen(model, self._layers, backend)
        inside = names_inside(model, self._layers) if config.keep_active or backend.is_pipeline else {}
        if backend.is_pipeline:  # a stage holds its own modules only
            inside = self._ranks.merged(inside)
        kept = keep_active(config.keep_active, self._layers, inside, "smartfrz.keep_active")
        self._kept_active = set(kept.names)
        if backend.rank == 0 and (line := kept.told("smartfrz.keep_active")):
            logging.getLogger("smartfrz_ds").info(line)
        total = config.total_steps
        self.total_steps: int | None = total_steps_of(scheduler) if total == "auto" else total
        self._snapshots = Snapshots(self._layers, backend, sample_size=config.sample_size, seed=config.seed)
        self._probe_batch = probe_batch
        self._early_state: Mapping[str, Any] | None = None
        self.released = False
        self._awaits = later
        self._build_policy(manual=later)
        self._ranks.assert_same(
            f"settings {digest(config)}, package {version}, layers {self._names}", "settings, package versions or layers"
        )

        self._inputs.try_probe()

        self._history = History(config.window)
        self._remaining_lr = RemainingLr(scheduler, self.total_steps)
        self._log = RunLog(
            Path(config.log_path) if config.log_path and backend.rank == 0 else None,
            monitor if backend.rank == 0 else None,
            samples=lambda: int(getattr(backend.engine, "global_samples", 0)),
        )
        self._status = RunStatus(self._log, backend, self._ranks, self._layers, self._intervals.status_interval)
        self._speaker = Speaker(self, self._log, self._layers, lambda: self._tally.saved_fraction)
        self._status.outcome = self._speaker.outcome
        # It compares in the first forward, then removes its hooks. A pipeline's order is its list of layers; "any" asks for none.
        self._order = None if backend.is_pipeline or config.order == "any" else OrderCheck(model, self._layers)

        self._flops, self._tally = FlopMeter(model, self._layers, config.tied), FlopTally(self._layers)
        names = {p: name for name, p in model.named_parameters()}
        self._mode = ForwardMode(model)
        self._gradients = GradientCheck(
            model,
            names,
            self._ranks,
            self._ranks.union(names.values()) if backend.is_pipeline else None,
            mode=self._mode,
            doubt=config.gradient_check,
            warn=self._warn,
        )
        # In a pipeline the schedule keeps the boundary open, and reentrant checkpointing is refused.
        self._recompute = RecomputeBoundary(() if backend.is_pipeline else self._layers, on_late=self._check_late, mode=self._mode)
        self._kept = KeptFrozen(backend.forward_module(model), backend)
        self._guard = self._make_guard()
        self._rebalancer = backend.pipeline(self._ranks, config.pipeline, config.tied)

        self.step = 0
        self._frozen: set[str] = set()
        self._frozen_before_load: set[str] | None = None
        self._frozen_at: dict[str, int] = {}
        self._lr = current_lr(backend.base_optimizer())
        self._lr_spent = 0.0
        self._cooldown = 0
        self._warned_once = self._warned_blind = self._warned_uncuttable = False
        self._metrics: dict[str, float] = {}
        self._note = ""
        self._profiled_together = False
        self._seconds = self._freeze_seconds = 0.0
        self._inside = False
        self.last_checkpoint: str | None = None
        self._bandwidths: Bandwidths | None = None
        self._predicted: PausePrediction | None = None
        self._width: Width | None = None
        for text in backend.warnings:
            self._warn(text)
        self._warn_if_never()
        self._after_layout_change()
        self._gradients.record_start(self._backend.trained, stage_follows=False)
        self._speaker.length_from = scheduler_name(scheduler) if total == "auto" else "smartfrz.total_steps"
        if not later:
            self._speaker.start()

    def _build_policy(self, *, manual: bool = False) -> None:
        """Make the policy and what it needs. manual: a stand-in that decides nothing, until `learn` was called. Collective."""
        config = self.config.model_copy(update={"policy": "manual"}) if manual else self.config
        try:  # a file or a batch may be missing on one rank alone
            self._intervals = resolve(config, self.total_steps, provisional=manual or not config.enabled)
            run = RunInfo(
                total_steps=self.total_steps,
                freeze_interval=self._intervals.freeze_interval,
                keep_active=frozenset(self._kept_active),
                probe_batch=self._probe_batch,
            )
            self._policy = build_policy(config, self._layers, self.total_steps)
            self._inputs = PolicyInputs(self._policy, config, self._model, self._layers, self._backend, self._snapshots, run)
        except (ValueError, OSError) as error:
            self._ranks.raise_if_any_failed(str(error), type(error))
            raise
        self._ranks.raise_if_any_failed("", ValueError)

    # --- what a user sees -----------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, front to back, the head too."""
        return self._names

    @property
    def intervals(self) -> Intervals:
        """The settings that count steps, as numbers of steps; provisional until the length of the run is known (`learn`)."""
        return self._intervals

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze these layers now. Collective, at a step boundary, with the same names on every rank.

        A layer that the user froze before the start stays the user's; the log says so.

        Raises:
            ValueError: a name that is no layer, or a set that `order` or `keep_active` forbids.
            RuntimeError: not at a step boundary, or after `release`.
            RanksDisagree: the ranks named different layers.
        """
        self._check_attached("freeze")
        wanted = _as_set(names)
        self._ranks.assert_same(f"freeze {sorted(wanted)} at step {self.step} on top of {self.frozen}", "layers to freeze")
        theirs = wanted.intersection(self._users.names)
        check_known(self._layers, wanted - theirs, "freeze")
        blocked = sorted((wanted - theirs) & self._kept_active)
        if blocked:
            raise ValueError(f"freeze: {blocked} stay active by smartfrz.keep_active {list(self.config.keep_active)}")
        self._note_users(theirs, "freeze: already frozen by the user: {}")
        self._change(self._frozen | (wanted - theirs), kind="freeze")

    def thaw(self, names: Iterable[str]) -> None:
        """Let these layers train again. Collective, at a step boundary, with the same names on every rank.

        Within `keep_state` steps of its freeze a layer's optimizer state comes back exactly; later its moments start at zero, with
        the bias correction of a new parameter, and in half precision its master weight comes back rounded.
        A layer of which the user froze everything before the start trains from now on: its parameters join the groups of the parameters of
        the same names in the nearest layer. Where the user froze a part of a layer, that part stays frozen (user_frozen.py).

        Raises: as `freeze`; and ValueError for a layer that the user froze where such a layer can't train: in a pipeline, under FSDP1,
            quantized weights, a policy that sets learning rates of single layers.
        """
        self._check_attached("thaw")
        wanted = _as_set(names)
        self._ranks.assert_same(f"thaw {sorted(wanted)} at step {self.step} out of {self.frozen}", "layers to thaw")
        theirs = wanted.intersection(self._users.names)
        check_known(self._layers, wanted - theirs, "thaw")
        for name, params in self._users.partly(wanted - self._frozen).items():
            self._note_users(params, f"thaw: {name} is active; a part of it was frozen by the user and stays so: {{}}")
        with self._taking_in(theirs):
            self._change(self._frozen - wanted, kind="thaw")

    def drop_gradients(self) -> None:
        """Forget gradients of the model that no step has used, where another model's backward went through it (a GAN's discriminator).

        Call it on every rank, between steps. Under ZeRO-1 and 2 `zero_grad` leaves them, and the next step would use them.
        """
        self._backend.drop_gradients()

    def predict_pause(self, names: Iterable[str], *, action: Literal["freeze", "thaw"] = "freeze") -> PausePrediction:
        """What freezing or thawing these layers now would cost. Nothing is changed.

        Collective: the first call measures the cluster's bandwidths. The bytes are exact, the time is an estimate.

        Raises:
            ValueError: a name that is no layer.
        """
        wanted = _as_set(names)
        theirs = wanted.intersection(self._users.names)
        check_known(self._layers, wanted - theirs, "predict_pause")
        if action == "freeze":
            return self._predict(self._frozen | (wanted - theirs))
        self._users.take_in(theirs)
        try:
            return self._predict(self._frozen - wanted)
        finally:
            self._users.give_back(theirs)

    def learn(self, *, scheduler: Any = None, total_steps: int | None = None, told_by: str = "learn()") -> None:
        """What `attach(…, later=True)` could not know: the scheduler, and the length of the run (steps; None: the scheduler's).

        Collective, before the first step; once. A number at `smartfrz.total_steps` wins. What a checkpoint that was loaded meanwhile says
        of the policy is taken up now. told_by: who says total_steps, for the line at the start.

        Raises ValueError for what the policy refuses.
        """
        if not self._awaits:
            return
        self._awaits = False
        if self.config.total_steps == "auto":
            known = self.total_steps
            # not by assignment, which is refused once it is set (guarded.py)
            self.__dict__["total_steps"] = total_steps or total_steps_of(scheduler) or known
            if self.total_steps != known:
                self._speaker.length_from = told_by if total_steps else scheduler_name(scheduler)
        self._build_policy()
        self._inputs.try_probe()
        self._remaining_lr = RemainingLr(scheduler if scheduler is not None else self._remaining_lr.scheduler, self.total_steps)
        self._status.interval = self._intervals.status_interval
        if self._guard is not None:
            self._guard.guard.window = self._intervals.guard_window
        if self._early_state is not None:
            self._load_policy_state(self._early_state)
            self._early_state = None
        self._warn_if_never()
        self._gradients.record_start(self._backend.trained, stage_follows=self._stage_at(self.step + 1))
        self._speaker.start()

    def release(self) -> None:
        """Give the model back as it was: every layer trains, no hook is left. The engine must not be trained any further, but it can be
        saved. A second call changes nothing: somebody else may have the model by then."""
        if self.released:
            return
        self._speaker.end()
        self.released = True
        self._log.close()
        for layer in self._layers:
            if layer.name in self._frozen:
                thaw_modules(layer, self._model.training)
        self._kept.remove()
        for param in self._backend.frozen:
            param.requires_grad_(True)
        self._backend.leave()
        self._recompute.remove()
        self._gradients.disarm()
        self._mode.remove()
        self._flops.remove()
        if self._order is not None:
            self._order.remove()
        self._inputs.remove()
        if self._rebalancer is not None:
            self._rebalancer.remove()

    def sync_for_checkpoint(self) -> None:
        """Bring what the ranks hold apart from each other together, before rank 0's state is saved for all. Collective."""
        self._inputs.sync_for_checkpoint()
        if self._guard is not None:
            self._guard.sync_for_checkpoint()

    def put_back(self) -> None:
        """Switch frozen parameters off again that other code has switched on (`requires_grad`); before a checkpoint, for example."""
        self._kept.put_back()

    @property
    def backend(self) -> Backend:
        """The engine's inside; for checkpoints."""
        return self._backend

    @property
    def first_stage(self) -> int | None:
        """The step of the first freezing stage, however long the run is; None with the policy `manual`."""
        return None if self.config.policy == "manual" else self._intervals.first_from(1)

    @property
    def threshold(self) -> float | None:
        """What a probability of the policy must reach; None where it has no such number."""
        threshold = getattr(self._policy, "threshold", None)
        return float(threshold) if threshold is not None else None

    @property
    def keeps_state(self) -> bool:
        """Whether released state is held back for a thaw."""
        return self._keep_steps > 0

    @property
    def ranks(self) -> Collectives:
        """All processes of the run; for checkpoints."""
        return self._ranks

    def observe(self, **metrics: float) -> None:
        """Tell the controller a metric of the run (`observe(loss=0.3)`); the newest value of each goes into the report of the log."""
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.update(values)
        self._status.tell(values)
        if self._guard is not None:
            self._guard.feed.tell(values)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The newest value of each observed metric."""
        return dict(self._metrics)

    def report(self) -> Report:
        """Where the run stands, as this rank sees it."""
        return Report(
            step=self.step,
            layers=self._names,
            frozen=self.frozen,
            events=tuple(self._log.events),
            optimizer_bytes=self._backend.optimizer_bytes(),
            plugin_seconds=self._seconds,
            freeze_seconds=self._freeze_seconds,
            saved_flops_fraction=self._tally.saved_fraction,
            predicted_pause=self._predicted,
            policy_note=self._note,
            width_note="" if self._width is None else self._width.advice(self._checkpoint_folder),
            user_frozen=self._users.names,
            log_path="" if self._log.path is None else str(self._log.path),
            outcome=self._speaker.outcome(),
        )

    def state_dict(self) -> dict[str, Any]:
        """The freeze state: numbers, names, and on rank 0 the history's tensors."""
        return {
            "step": self.step,
            "layers": list(self._names),
            "sizes": [whole_numel(layer) for layer in self._layers],
            "user_frozen": self._users.state_dict(),
            "frozen": list(self.frozen),
            "frozen_at": dict(self._frozen_at),
            "lr_spent": self._lr_spent,
            "cooldown": self._cooldown,
            "flops": [self._tally.whole, self._tally.done],
            "policy": {"name": self._policy.name, "state": self._policy.state_dict()},
            "history": self._history.state_dict(),
            "sample": [self.config.sample_size, self.config.seed],
            "spacing": self._intervals.spacing,
            "guard": None if self._guard is None else self._guard.state_dict(),
            "recompute": self._recompute.state_dict(),
            "supplies": self._inputs.state_dict(),
            "status": self._status.state_dict(),
            "stages": self._speaker.stages.state_dict(),
            **self._log.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a freeze state: brings the layout to its frozen set, then everything else. Collective, at a step boundary.

        Raises:
            ValueError: the state is of another model; nothing is changed.
        """
        self.check_state(state)
        self.hand_back(self.restore_layout_of(state).were_users)
        self.take_up(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a freeze state is of another model; collective."""
        if tuple(state["layers"]) != self._names:
            raise ValueError(f"the freeze state is of another model: its layers are {state['layers']}, this model's {list(self._names)}")
        # Who froze a layer may be another one now: all weights count, but in states of versions that knew of trainable ones only.
        own = [whole_numel(layer) if "user_frozen" in state else layer.numel for layer in self._layers]
        for name, theirs, ours in zip(self._names, state.get("sizes", own), own, strict=True):
            if theirs != ours:
                raise ValueError(f"the freeze state is of another model: its layer {name!r} has {theirs} weights, this model's {ours}")
        self._ranks.assert_same(f"load frozen {state['frozen']} at step {state['step']}", "freeze states to load")

    def take_up(self, state: Mapping[str, Any], folder: str = "") -> None:
        """All of a freeze state but the layout, after the tensors: counts, the policy's state, history, the log's position.

        folder: of the checkpoint, for the record.
        """
        left = self.step
        self.step = int(state["step"])
        self._frozen_at = dict(state["frozen_at"])
        self._lr_spent, self._cooldown = float(state["lr_spent"]), int(state["cooldown"])
        self._tally.whole, self._tally.done = state["flops"]
        self._lr = current_lr(self._backend.base_optimizer())
        # Other weights are no continuation of these.
        same = state.get("sample", [self.config.sample_size, self.config.seed]) == [self.config.sample_size, self.config.seed]
        self._history.load_state_dict(state["history"] if same else {})
        if self._guard is not None and state.get("guard") is not None:
            self._guard.load_state_dict(state["guard"])
        if not self.released:
            self._recompute.load_state_dict(state.get("recompute", {}))
        self._width = None
        if self._rebalancer is not None:
            self._rebalancer.due = bool(self._frozen)
        self._status.restart(state.get("status"))
        if self._log.trained:
            self._loaded(left, folder)
        else:
            self._frozen_before_load = None
            self._log.resume(state, self.step)
            self._speaker.resumed(folder, state.get("stages"))
        if self._awaits:
            self._early_state = state
        else:
            self._load_policy_state(state)

    def _load_policy_state(self, state: Mapping[str, Any]) -> None:
        """The policy's state and what was measured for it, as far as this run's settings and length continue those of the saved run."""
        now = self._intervals.spacing
        saved = state.get("spacing") or now  # older checkpoints don't say
        if state["policy"]["name"] == self._policy.name and saved == now:
            self._policy.load_state_dict(state["policy"]["state"])
        else:
            self._renew_policy()
        measured = dict(state.get("supplies", {}))
        if saved["measured"] != now["measured"] and "manual" not in (state["policy"]["name"], self._policy.name):
            # Snapshots further apart move further, and gradients are summed over an interval: mixed ones look like a change of the layer.
            self._history.load_state_dict({})
            measured["gradients"] = None
            self._warn(
                f"the checkpoint was saved with snapshots every {saved['measured'][0]} steps and freezing stages every "
                f"{saved['measured'][1]}, this run has them every {now['measured'][0]} and {now['measured'][1]} steps: frozen layers stay "
                "frozen, and the policy starts anew. To continue it, set smartfrz.snapshot_interval and freeze_interval to the former"
            )
        self._inputs.load_state_dict(measured)

    def reset(self, step: int, folder: str = "") -> None:
        """Begin to watch anew at `step`, with nothing known: after loading a checkpoint that has no freeze state.

        folder: of the checkpoint, for the record.
        """
        left = self.step
        self.step, self._lr_spent, self._cooldown = step, 0.0, 0
        self._frozen_at.clear()
        self._tally.whole = self._tally.done = 0.0
        self._lr = current_lr(self._backend.base_optimizer())
        self._renew_policy()
        self._history.load_state_dict({})
        self._guard = self._make_guard()
        self._status.restart()
        if self._log.trained:
            self._loaded(left, folder)
        else:
            self._speaker.resumed(folder, None)
        self._frozen_before_load = None

    def loaded_weights(self, folder: str) -> None:
        """Say that only weights were loaded from a checkpoint: the run stays what it is."""
        self._loaded(self.step, folder, weights_only=True)

    def _renew_policy(self) -> None:
        if self._awaits:
            self._early_state = None
            return
        self._policy = build_policy(self.config, self._layers, self.total_steps)
        self._inputs.restart(self._policy)

    # --- the loop -------------------------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """To be called after every successful optimizer step, on every rank."""
        began = time.perf_counter()
        self._inside = True
        self.learn()  # nobody did
        self._status.begin(self)
        self._log.trained = True
        self.step += 1
        self._lr_spent += self._lr
        self._lr = current_lr(self._backend.base_optimizer())
        if self._backend.is_pipeline:
            if not self._profiled_together:
                self._profile_together()
        elif self._flops.profile is not None and self._tally.profile is not self._flops.profile:
            self._tally.measured(self._flops.profile)
        self._count_step()
        self._inputs.end_step(applied=True)
        if self._guard is not None and (verdict := self._guard.after_step(self.step)):
            about = {"reasons": dict.fromkeys(verdict.layers, verdict.reason)}
            self._change(self._frozen - set(verdict.layers), kind="thaw", about=about)
        if self._keep_steps:
            self._forget_old_state()
        if self._watches and self.step % self._intervals.snapshot_interval == 0:
            self._take_snapshot()
        if self._stage_at(self.step):
            self._freezing_stage(began)
            if self._guard is not None:
                self._guard.guard.stage_passed()
        self._rebalance_if_due()
        self._inside = False
        self._gradients.record_start(self._backend.trained, stage_follows=self._stage_at(self.step + 1))
        self._seconds += time.perf_counter() - began
        self._status.end(self, own_seconds=self._seconds, lr=self._lr, saved=self._tally.saved_fraction)

    def before_step(self) -> None:
        """To be called when all micro-batches of a step are through, before the optimizer, on every rank.

        Raises:
            MissingGradients: the first time after a freeze, where it cut off an active layer's gradients.
        """
        self.learn()
        self._lr = current_lr(self._backend.base_optimizer())  # a scheduler, or a load, of the user's comes after `after_step`
        self._gradients.saw(self._backend.gradients_now())
        self._gradients.before_step(self._backend.trained, self.frozen)
        self._inputs.before_step(self.step)

    def step_skipped(self) -> None:
        """To be called where the optimizer skipped a step (overflow): it is no step, its loss and gradients don't count."""
        self._inputs.end_step(applied=False)
        self._status.skipped()
        if self._guard is not None:
            self._guard.feed.end_step(applied=False)

    def record_loss(self, loss: Any) -> None:
        """A micro-batch's loss, as it goes into backward."""
        self._status.loss(loss)
        if self._guard is not None:
            self._guard.feed.loss(loss)

    def _stage_at(self, step: int) -> bool:
        """Whether a step ends in a freezing stage."""
        return self._watches and self._intervals.is_stage(step, self.total_steps)

    @property
    def _watches(self) -> bool:
        """Whether a policy is at work at all."""
        return self.config.policy != "manual" and bool(self._candidates())

    def _take_snapshot(self) -> None:
        values = self._snapshots.take()
        if values is not None:
            recorded = {layer.name: values[layer.position] for layer in self._layers if layer.name in self._recorded}
            self._history.record(self.step, self._inputs.lr_spent(self._lr_spent), recorded)

    def _freezing_stage(self, began: float) -> None:
        if self._guard is not None and self._guard.was_blind():
            self._warn_blind("since the last freezing stage")
        if self._cooldown > 0:
            self._cooldown -= 1
            return
        if self._guard is not None and self._guard.guard.watching:
            return  # one freeze at a time, so that the guard knows which one it was
        self._inputs.gather(self._recorded)
        own: tuple[Decision, frozenset[str], str] = (Decision(), frozenset(), "")
        if self._ranks.rank == 0:
            own = decide(self._policy, self._view, self._allowed, step=self.step)
            self._note = own[0].note or self._note
        heard = broadcast_decision(self._ranks, self._names, own, f"step {self.step}, layers {self._names}, frozen {self.frozen}")
        if heard.failure:
            self._warn(heard.failure, once=True)
        self._speaker.stages.judged(
            self.step,
            heard.chosen,
            heard.probabilities,
            heard.reasons,
            failed=bool(heard.failure),
            ordered=self.config.order == "front_to_back",
        )
        about: dict[str, Any] = {"probabilities": heard.probabilities, "reasons": heard.reasons}
        if heard.chosen and not self.config.dry_run and not self._uncuttable(self._frozen | heard.chosen):
            self._change(self._frozen | heard.chosen, kind="freeze", about=about, began=began)
            self._cooldown = self.config.cooldown
        elif heard.chosen or heard.probabilities:
            layers, dry_run = self._sorted(heard.chosen), self.config.dry_run
            self._record(FreezeEvent(kind="decision", step=self.step, layers=layers, frozen=self.frozen, dry_run=dry_run, **about))

    def _view(self) -> View:
        ahead = self._remaining_lr.ahead(self.step)
        return View(
            step=self.step,
            total_steps=self.total_steps,
            lr_spent=self._lr_spent,
            lr_remaining=None if ahead is None else sum(ahead),
            lr_ahead=None if ahead is None else torch.tensor(ahead, dtype=torch.float64),
            layers=layer_infos(self._layers),
            frozen=self.frozen,
            candidates=self._ready(),
            windows=self._history.windows(),
            window_size=self.config.window,
            **self._inputs.seen,
            profile=self._tally.profile,
            flops_full=self._tally.whole,
            flops_done=self._tally.done,
        )

    def _candidates(self) -> tuple[str, ...]:
        return candidates(self._layers, self._frozen, self._kept_active)

    def _profile_together(self) -> None:
        """In a pipeline each rank has measured its own stage, in the step that has just passed. Collective, once."""
        self._profiled_together = True
        self._flops.remove()
        none = [0.0] * len(self._layers)
        own = none if self._flops.profile is None else list(self._flops.profile.forward)
        mine = none if self._flops.profile is None else [float(bool(x.modules or x.borrowed)) for x in self._layers]
        forward, measured = self._ranks.all_reduce_sum(own), self._ranks.all_reduce_sum(mine)
        # A stage that was frozen from the first step on (a resume) has measured nothing: its weights stand for it. An embedding that was
        # looked at costs nothing.
        seen = [(flops, x.numel) for flops, there, x in zip(forward, measured, self._layers, strict=True) if there and flops]
        a_weight = sum(flops for flops, _ in seen) / max(1, sum(numel for _, numel in seen)) if seen else 2.0
        costs = [f if there else a_weight * x.numel for f, there, x in zip(forward, measured, self._layers, strict=True)]
        self._tally.measured(chain_profile(costs))

    def _ready(self) -> tuple[str, ...]:
        """The candidates that don't have to wait after a freeze that was taken back."""
        waiting = frozenset() if self._guard is None else self._guard.guard.waiting
        return tuple(name for name in self._candidates() if name not in waiting)

    def _allowed(self, names: Sequence[str]) -> frozenset[str]:
        order, most = self.config.order, self.config.max_frozen_fraction
        return allowed(self._layers, self._frozen, names, order=order, max_frozen_fraction=most)

    def _check_attached(self, call: str) -> None:
        if self.released:
            raise RuntimeError(
                f"{call}: this controller was released, and no longer acts on its engine; allowed: attach again, and {call} with the new "
                "controller"
            )

    # --- small things ---------------------------------------------------------------------------------------------------------

    def _warn_if_never(self) -> None:
        """Say at the start that nothing can freeze, where that follows from the settings and the length of the run."""
        if not self._awaits and self._watches and (why := why_never(self.config, self.total_steps)):
            self._warn(why)

    def _make_guard(self) -> GuardedRun | None:
        settings = self.config.guard
        if settings is None:
            return None
        guard = Guard(
            tolerance=settings.tolerance, window=self._intervals.guard_window, smoothing=settings.smoothing, wait=self.config.cooldown
        )
        return GuardedRun(guard, settings.metric, self._ranks)


def _as_set(names: Iterable[str]) -> set[str]:
    return {names} if isinstance(names, str) else set(names)
