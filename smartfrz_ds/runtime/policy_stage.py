"""A freezing stage: the policy decides on rank 0, and all ranks receive the same decision. Also provides the policy's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.model.flops import FlopTally
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.model.view import View, layer_infos
from smartfrz_ds.policies import SHARED_SETTINGS, check_order_of, make_policy
from smartfrz_ds.policies.base import ChangesAtSteps, ChecksStart, Decision, Policy
from smartfrz_ds.policies.own import saved_state
from smartfrz_ds.runtime.observers.metric_means import MetricMeans
from smartfrz_ds.runtime.observers.protocol import LayoutChange, StepObserver
from smartfrz_ds.runtime.rules.eligibility import allowed, candidates, check_order, recorded
from smartfrz_ds.runtime.rules.intervals import resolve, why_never
from smartfrz_ds.runtime.rules.user_frozen import UserFrozen
from smartfrz_ds.signals.history import History
from smartfrz_ds.signals.lr_forecast import RemainingLr, ScheduleUnit, total_steps_of
from smartfrz_ds.signals.policy_inputs import PolicyInputs, RunInfo
from smartfrz_ds.signals.snapshots import Snapshots
from smartfrz_ds.telemetry.speaking import scheduler_name

from .decision import StageDecision as StageDecision
from .decision import broadcast_decision, decide
from .run_context import RunContext


class PolicyStage(StepObserver):
    """The policy of one run, its inputs, and its freezing stages. Created on every rank. Collective.

    Args:
        run: The run.
        snapshots: Samples the weights.
        history: The last snapshots of each layer.
        tally: The FLOPs of each layer and of the run.
        kept_active: Layers that no policy freezes.
        users: Layers that the user froze.
        metrics: The means of metrics that the policy waits for; None if it waits for none.
        scheduler: The optimizer's scheduler or None.
        probe_batch: As in `attach`.
        deferred: Whether the scheduler and the length of the run follow with `set_schedule`. Until then a policy that decides nothing
            replaces the configured one.

    Attributes:
        inputs: The policy's inputs other than sampled weights.
        note: The policy's remark on its plan as a whole, on rank 0.
        is_planned: Whether the policy knows the steps of its changes (`ChangesAtSteps`).

    Raises:
        ValueError: The policy refuses the run.
    """

    def __init__(
        self,
        run: RunContext,
        snapshots: Snapshots,
        history: History,
        tally: FlopTally,
        *,
        kept_active: frozenset[str],
        users: UserFrozen,
        metrics: MetricMeans | None,
        scheduler: Any,
        probe_batch: Any,
        deferred: bool,
    ) -> None:
        self._run, self._snapshots, self._history, self._tally = run, snapshots, history, tally
        self._kept_active, self._probe_batch = kept_active, probe_batch
        self._users, self._metrics = users, metrics
        self.deferred = deferred
        self.note = ""
        self._warned_failure = False
        self._early_state: Mapping[str, Any] | None = None
        self._means: Mapping[str, float] = {}
        self._watches: bool | None = None  # `watches` with the current layout; None: not asked yet
        self._build(manual=deferred)
        self._remaining_lr = RemainingLr(scheduler, run.total_steps)
        self._unit = ScheduleUnit(scheduler)

    def _build(self, *, manual: bool = False) -> None:
        """Build the policy and its inputs. Collective.

        Args:
            manual: Whether to build a policy that decides nothing instead of the configured one.
        """
        run = self._run
        config = run.config.model_copy(update={"policy": "manual"}) if manual else run.config

        def build() -> None:  # a file or a batch may be missing on a single rank
            run.intervals = resolve(config, run.total_steps, provisional=manual or not config.enabled)
            info = RunInfo(
                total_steps=run.total_steps,
                freeze_interval=run.intervals.freeze_interval,
                keep_active=self._kept_active,
                probe_batch=self._probe_batch,
            )
            self._use(build_policy(config, run.layers, run.total_steps))
            self.inputs = PolicyInputs(self.policy, config, run.model, run.layers, run.backend, self._snapshots, info)

        run.ranks.run_on_all_ranks(build)
        if self.is_planned:  # ranks that differ would wait for each other
            run.ranks.assert_same(f"changes at the steps {sorted(self._change_steps)}", "steps of the policy")

    def _use(self, policy: Policy) -> None:
        self.policy = policy
        planned = isinstance(policy, ChangesAtSteps) and self._run.config.policy != "manual"
        # Called on every rank together with the policy's own checks, so an error is raised on all of them.
        steps = frozenset(map(int, policy.change_steps(self._run.total_steps))) if isinstance(policy, ChangesAtSteps) and planned else None
        self._change_steps: frozenset[int] = steps or frozenset()
        self.is_planned, self._late = planned, planned
        threshold = getattr(policy, "threshold", None)
        self._run.threshold = float(threshold) if threshold is not None else None

    def set_schedule(self, scheduler: Any, total_steps: int | None) -> bool:
        """Replace the provisional policy by the configured one. Collective.

        Args:
            scheduler: The optimizer's scheduler or None.
            total_steps: Length of the run in steps; None: read it off the scheduler.

        Returns:
            Whether the length of the run has changed.

        Raises:
            ValueError: The policy refuses the run.
        """
        run = self._run
        self.deferred = False
        known = run.total_steps
        if run.config.total_steps == "auto":
            run.total_steps = total_steps or total_steps_of(scheduler) or known
        self._build()
        self.try_probe()
        self._remaining_lr = RemainingLr(scheduler if scheduler is not None else self._remaining_lr.scheduler, run.total_steps)
        self._unit = ScheduleUnit(self._remaining_lr.scheduler)
        return run.total_steps != known

    def try_probe(self) -> None:
        """Run the probe batch once, so that an unsuitable batch is found before training. Collective.

        Raises:
            ValueError: The model's forward does not accept it, on this rank or another one.
        """
        if self.inputs.has_probe:
            self._together(self.inputs.try_probe)

    def _together(self, forward: Callable[[], None]) -> None:
        """Run a forward on all ranks; an error on one rank is raised on all of them.

        Where the forward itself communicates (ZeRO-3, FSDP), the others wait within it for the rank that failed, and can't be told: the
        error is raised on that rank alone, and the others lose contact when it ends.
        """
        if self._run.backend.gathers_in_forward and not self._run.ranks.alone:
            forward()
        else:
            self._run.ranks.run_on_all_ranks(forward)

    def drop_schedule(self) -> bool:
        """Drop the scheduler if it does not count steps. Call at a freezing stage; collective until the answer is known.

        A scheduler that moves once per epoch counts epochs: all shares of the run would refer to a number that is far too small.

        Returns:
            Whether it was dropped. The intervals may have changed then.
        """
        run, unit = self._run, self._unit
        if unit.known or not unit.began(run.state.step):
            return False
        unit.known = True
        slower = run.ranks.all_reduce_sum([float(unit.is_slower(run.state.step))])[0]
        if not slower or run.total_steps is None:  # without a length, the scheduler is not used
            return False
        told = total_steps_of(unit.scheduler)
        text = f"the {scheduler_name(unit.scheduler)} does not move with each optimizer step, it may count epochs: "
        if run.config.total_steps != "auto" or run.total_steps != told:
            text += "its future learning rates are not used"
        else:
            run.total_steps = None
            self.inputs.remove()
            self._history.load_state_dict({})
            text += f"its length, {told}, is not used, and the length of the run counts as unknown"
            try:
                self._build()
            except ValueError as error:
                self._build(manual=True)
                text += f". From now on nothing freezes: {error}"
            text += ". Set smartfrz.total_steps to the number of optimizer steps of the whole run"
        self._remaining_lr = RemainingLr(None, run.total_steps)
        run.journal.warn(text)
        return True

    def warn_if_never(self) -> None:
        """Warn at the start if the settings and the length of the run imply that nothing can freeze."""
        if not self.deferred and self.watches and (why := why_never(self._run.config, self._run.total_steps)):
            self._run.journal.warn(why)

    # --- when -----------------------------------------------------------------------------------------------------------------

    @property
    def watches(self) -> bool:
        """Whether a policy is active: it is not "manual", and there is a layer that it may freeze."""
        if self._watches is None:  # asked several times a step
            # A planned policy may thaw when nothing is left to freeze.
            self._watches = self._run.config.policy != "manual" and (self.is_planned or bool(self._candidates()))
        return self._watches

    def is_stage(self, step: int) -> bool:
        """Whether a step ends in a freezing stage."""
        watches = self.watches if self._watches is None else self._watches  # each call counts: this is asked twice a step
        if watches and self.is_planned and step != self._run.total_steps and (self._late or step in self._change_steps):
            return True
        return watches and self._run.intervals.is_stage(step, self._run.total_steps)

    @property
    def begins_now(self) -> bool:
        """Whether the policy has changes for the moment before the first step."""
        return not self.deferred and self.is_planned and self._run.state.step == 0 and 0 in self._change_steps

    # --- the stage ------------------------------------------------------------------------------------------------------------

    def judge(self, waiting: frozenset[str]) -> StageDecision:
        """Let the policy on rank 0 decide, and broadcast its decision. Collective.

        Args:
            waiting: Candidates that the policy may not freeze yet.

        Raises:
            RanksDisagree: The ranks differ in step, frozen set or decision. Raised on all ranks.
        """
        run, self._late = self._run, False
        if self._metrics is not None:
            self._means = self._metrics.take()
        self.inputs.gather(recorded(run.layers, run.state.frozen))
        if self.inputs.has_probe:
            self._together(self.inputs.run_probe)
        own: tuple[Decision, frozenset[str], str] = (Decision(), frozenset(), "")
        if run.ranks.rank == 0:
            own = decide(self.policy, lambda: self._view(waiting), self._allowed, step=run.state.step)
            self.note = own[0].note or self.note
        names = run.state.layers
        about = f"step {run.state.step}, layers {names}, frozen {run.state.frozen_in_order}"
        heard = broadcast_decision(run.ranks, names, own, about)
        if heard.failure and not self._warned_failure:
            self._warned_failure = True
            run.journal.warn(heard.failure)
        run.journal.speaker.stages.judged(
            run.state.step,
            heard.chosen,
            heard.probabilities,
            heard.reasons,
            failed=bool(heard.failure),
            ordered=run.config.order == "front_to_back",
        )
        return heard

    def _view(self, waiting: frozenset[str]) -> View:
        run = self._run
        ahead = self._remaining_lr.ahead(run.state.step)
        return View(
            step=run.state.step,
            total_steps=run.total_steps,
            lr_spent=run.state.lr_spent,
            lr_remaining=self._remaining_lr.remaining(run.state.step),
            lr_ahead=None if ahead is None else torch.from_numpy(ahead),
            layers=layer_infos(run.layers),
            frozen=run.state.frozen_in_order,
            candidates=tuple(name for name in self._candidates() if name not in waiting),
            windows=self._history.windows(),
            window_size=run.config.window,
            gradients=self.inputs.seen.get("gradients", {}),
            grams=self.inputs.seen.get("grams", {}),
            user_frozen=self._users.names,
            metrics=self._means,
            profile=self._tally.profile,
            flops_full=self._tally.whole,
            flops_done=self._tally.done,
        )

    def _candidates(self) -> tuple[str, ...]:
        return candidates(self._run.layers, self._run.state.frozen, self._kept_active)

    def _allowed(self, decision: Decision) -> frozenset[str]:
        config, layers, frozen = self._run.config, self._run.layers, self._run.state.frozen
        most = 1.0 if self.is_planned else config.max_frozen_fraction
        chosen = allowed(layers, frozen, decision.freeze, order=config.order, max_frozen_fraction=most)
        if decision.thaw:
            check_order(layers, (frozen | chosen) - set(decision.thaw), config.order)
        return chosen

    # --- as an observer, for the inputs -----------------------------------------------------------------------------------------

    def before_step(self) -> None:
        self.inputs.before_step(self._run.state.step)

    def step_skipped(self) -> None:
        self.inputs.end_step(applied=False)

    def after_step(self) -> None:
        self.inputs.end_step(applied=True)
        self._unit.after_step(self._run.state.step)

    def on_layers_changed(self) -> None:
        self._watches = None
        self.inputs.regroup()

    def on_layout_change(self, change: LayoutChange) -> None:
        self._watches = None
        if change.kind in ("freeze", "thaw", "restore"):
            self.inputs.thawed(change.back)
            self.inputs.watch(self._snapshots.requests)

    def sync_for_checkpoint(self) -> None:
        self.inputs.sync_for_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": {"name": self.policy.name, "state": saved_state(self.policy)},
            "spacing": self._run.intervals.spacing,
            "supplies": self.inputs.state_dict(),
        }

    def load_policy_state(self, state: Mapping[str, Any] | None = None) -> None:
        """Load the policy's state and measurements, as far as this run continues the settings and the length of the saved one.

        Called after all observers have loaded. If the length of the run is not known yet, the state is held until it is.

        Args:
            state: The whole freeze state; None: the one that is held, if any.
        """
        if self.deferred:
            self._early_state = state
            return
        if state is None:
            state, self._early_state = self._early_state, None
        if state is None:
            return
        self._unit.restart()
        now = self._run.intervals.spacing
        spacing = state.get("spacing") or now  # older checkpoints do not have it
        name, saved = state["policy"]["name"], state["policy"]["state"]
        if name == self.policy.name and spacing == now:
            self._run.ranks.run_on_all_ranks(lambda: self.policy.load_state_dict(saved))
        else:
            self._renew()
        measured = dict(state.get("supplies", {}))
        if spacing["measured"] != now["measured"] and "manual" not in (name, self.policy.name):
            # Snapshots further apart move further, and gradients are summed over an interval: mixed ones look like a change of the layer.
            self._history.load_state_dict({})
            measured["gradients"] = None
            self._run.journal.warn(
                f"the checkpoint was saved with snapshots every {spacing['measured'][0]} steps and freezing stages every "
                f"{spacing['measured'][1]}, this run has them every {now['measured'][0]} and {now['measured'][1]} steps: frozen layers "
                "stay frozen, and the policy starts anew. To continue it, set smartfrz.snapshot_interval and freeze_interval to the saved "
                "values"
            )
        self.inputs.load_state_dict(measured)

    def reset(self) -> None:
        self._unit.restart()
        if self.deferred:
            self._early_state = None
        else:
            self._renew()

    def _renew(self) -> None:
        self._use(build_policy(self._run.config, self._run.layers, self._run.total_steps))
        self.inputs.restart(self.policy)

    def remove(self) -> None:
        self.inputs.remove()


def build_policy(config: FreezeConfig, layers: Sequence[Layer], total_steps: int | None) -> Policy:
    """Build the configured policy.

    Args:
        config: The settings.
        layers: All layers, front to back.
        total_steps: Length of the run in steps, None where unknown.

    Raises:
        ValueError: It refuses the settings, the order or the length of the run.
    """
    settings = dict(resolve(config, total_steps, provisional=config.policy == "manual").policy) | {
        key: getattr(config, key) for key in SHARED_SETTINGS.get(config.policy, ())
    }
    check_order_of(config.policy, config.order)
    policy = make_policy(config.policy, settings, config.policy_object)
    if isinstance(policy, ChecksStart):
        policy.check_start(total_steps, layer_infos(layers))
    return policy
