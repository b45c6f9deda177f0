"""A freezing stage: the policy judges on rank 0, all ranks hear the same decision. And everything that the policy needs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.flops import FlopTally
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.model.view import View, layer_infos
from smartfrz_ds.policies import SHARED_SETTINGS, make_policy
from smartfrz_ds.policies.base import ChecksStart, Decision, Policy
from smartfrz_ds.runtime.observers.protocol import LayoutChange, StepObserver
from smartfrz_ds.runtime.rules.eligibility import allowed, candidates, recorded
from smartfrz_ds.runtime.rules.intervals import resolve, why_never
from smartfrz_ds.signals.history import History
from smartfrz_ds.signals.lr_forecast import RemainingLr, ScheduleUnit, total_steps_of
from smartfrz_ds.signals.policy_inputs import PolicyInputs, RunInfo
from smartfrz_ds.signals.snapshots import Snapshots
from smartfrz_ds.telemetry.speaking import scheduler_name

from .run_context import RunContext


@dataclass(frozen=True, kw_only=True)
class StageDecision:
    """The decision of one freezing stage, as every rank received it.

    chosen: layers to freeze now. failure: why the policy could not decide, empty where it could (the text is rank 0's; the others have one
    of their own). probabilities: of judged layers, in [0, 1]. reasons: rank 0's, else empty.
    """

    chosen: frozenset[str] = frozenset()
    failure: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


class PolicyStage(StepObserver):
    """The policy of one run, what it is fed with, and the stages at which it judges.

    kept_active: layers that no policy freezes. deferred: the scheduler and the length of the run are still to come (`set_schedule`); until
    then a policy that decides nothing takes the place of the configured one.
    inputs: what the policy gets beyond sampled weights. note: what the policy says of its plan as a whole (rank 0).

    Made on every rank; collective. Raises ValueError for what the policy refuses.
    """

    def __init__(
        self,
        run: RunContext,
        snapshots: Snapshots,
        history: History,
        tally: FlopTally,
        *,
        kept_active: frozenset[str],
        scheduler: Any,
        probe_batch: Any,
        deferred: bool,
    ) -> None:
        self._run, self._snapshots, self._history, self._tally = run, snapshots, history, tally
        self._kept_active, self._probe_batch = kept_active, probe_batch
        self.deferred = deferred
        self.note = ""
        self._warned_failure = False
        self._early_state: Mapping[str, Any] | None = None
        self._build(manual=deferred)
        self._remaining_lr = RemainingLr(scheduler, run.total_steps)
        self._unit = ScheduleUnit(scheduler)

    def _build(self, *, manual: bool = False) -> None:
        """Make the policy and its inputs. manual: a policy that decides nothing. Collective."""
        run = self._run
        config = run.config.model_copy(update={"policy": "manual"}) if manual else run.config

        def build() -> None:  # a file or a batch may be missing on one rank alone
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

    def _use(self, policy: Policy) -> None:
        self.policy = policy
        threshold = getattr(policy, "threshold", None)
        self._run.threshold = float(threshold) if threshold is not None else None

    def set_schedule(self, scheduler: Any, total_steps: int | None) -> bool:
        """Replace the provisional policy by the configured one. Collective. Returns whether the length of the run has changed.

        Raises:
            ValueError: what the policy refuses.
        """
        run = self._run
        self.deferred = False
        known = run.total_steps
        if run.config.total_steps == "auto":
            run.total_steps = total_steps or total_steps_of(scheduler) or known
        self._build()
        self.inputs.try_probe()
        self._remaining_lr = RemainingLr(scheduler if scheduler is not None else self._remaining_lr.scheduler, run.total_steps)
        self._unit = ScheduleUnit(self._remaining_lr.scheduler)
        return run.total_steps != known

    def drop_schedule(self) -> bool:
        """At a freezing stage: go on without the scheduler where it counts something other than steps. Collective, until that is known.

        A scheduler that moves once an epoch counts epochs: all shares of the run would be taken of a number that is far too small.

        Returns:
            Whether it was dropped; the intervals may be others now.
        """
        run, unit = self._run, self._unit
        if unit.known or not unit.began(run.state.step):
            return False
        unit.known = True
        slower = run.ranks.all_reduce_sum([float(unit.is_slower(run.state.step))])[0]
        if not slower or run.total_steps is None:  # without a length nothing is taken from the scheduler
            return False
        told = total_steps_of(unit.scheduler)
        text = f"the {scheduler_name(unit.scheduler)} does not move with each optimizer step, it may count epochs: "
        if run.config.total_steps != "auto" or run.total_steps != told:
            text += "what it says of the learning rates to come is not used"
        else:
            run.total_steps = None
            self.inputs.remove()
            self._history.load_state_dict({})
            text += f"its length, {told}, is not used, and the length of the run counts as unknown"
            try:
                self._build()
            except ValueError as error:
                self._build(manual=True)
                text += f". From here on nothing freezes: {error}"
            text += ". Set smartfrz.total_steps to the number of optimizer steps of the whole run"
        self._remaining_lr = RemainingLr(None, run.total_steps)
        run.journal.warn(text)
        return True

    def warn_if_never(self) -> None:
        """Warn at the start that nothing can freeze, where that follows from the settings and the length of the run."""
        if not self.deferred and self.watches and (why := why_never(self._run.config, self._run.total_steps)):
            self._run.journal.warn(why)

    # --- when -----------------------------------------------------------------------------------------------------------------

    @property
    def watches(self) -> bool:
        """Whether a policy is at work: it is not "manual", and a layer is left that it may freeze."""
        return self._run.config.policy != "manual" and bool(self._candidates())

    def is_stage(self, step: int) -> bool:
        """Whether a step ends in a freezing stage."""
        return self.watches and self._run.intervals.is_stage(step, self._run.total_steps)

    # --- the stage ------------------------------------------------------------------------------------------------------------

    def judge(self, waiting: frozenset[str]) -> StageDecision:
        """Let the policy on rank 0 judge, and broadcast its decision. Collective.

        waiting: candidates that the policy may not freeze yet.

        Raises:
            RanksDisagree: on all ranks.
        """
        run = self._run
        self.inputs.gather(recorded(run.layers, run.state.frozen))
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
            lr_remaining=None if ahead is None else sum(ahead),
            lr_ahead=None if ahead is None else torch.tensor(ahead, dtype=torch.float64),
            layers=layer_infos(run.layers),
            frozen=run.state.frozen_in_order,
            candidates=tuple(name for name in self._candidates() if name not in waiting),
            windows=self._history.windows(),
            window_size=run.config.window,
            **self.inputs.seen,
            profile=self._tally.profile,
            flops_full=self._tally.whole,
            flops_done=self._tally.done,
        )

    def _candidates(self) -> tuple[str, ...]:
        return candidates(self._run.layers, self._run.state.frozen, self._kept_active)

    def _allowed(self, names: Sequence[str]) -> frozenset[str]:
        config = self._run.config
        return allowed(self._run.layers, self._run.state.frozen, names, order=config.order, max_frozen_fraction=config.max_frozen_fraction)

    # --- as an observer, for the inputs -----------------------------------------------------------------------------------------

    def before_step(self) -> None:
        self.inputs.before_step(self._run.state.step)

    def step_skipped(self) -> None:
        self.inputs.end_step(applied=False)

    def after_step(self) -> None:
        self.inputs.end_step(applied=True)
        self._unit.after_step(self._run.state.step)

    def on_layers_changed(self) -> None:
        self.inputs.regroup()

    def on_layout_change(self, change: LayoutChange) -> None:
        if change.kind in ("freeze", "thaw", "restore"):
            self.inputs.thawed(change.back)
            self.inputs.watch(self._snapshots.requests)

    def sync_for_checkpoint(self) -> None:
        self.inputs.sync_for_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": {"name": self.policy.name, "state": self.policy.state_dict()},
            "spacing": self._run.intervals.spacing,
            "supplies": self.inputs.state_dict(),
        }

    def load_policy_state(self, state: Mapping[str, Any] | None = None) -> None:
        """Load the policy's state and what was measured for it, as far as this run's settings and length continue those of the saved run.

        Called after all observers have loaded. Where the length of the run is still to come, the state waits for it.
        state: the whole freeze state; None: the one that waits, if there is one.
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
        saved = state.get("spacing") or now  # older checkpoints don't say
        if state["policy"]["name"] == self.policy.name and saved == now:
            self.policy.load_state_dict(state["policy"]["state"])
        else:
            self._renew()
        measured = dict(state.get("supplies", {}))
        if saved["measured"] != now["measured"] and "manual" not in (state["policy"]["name"], self.policy.name):
            # Snapshots further apart move further, and gradients are summed over an interval: mixed ones look like a change of the layer.
            self._history.load_state_dict({})
            measured["gradients"] = None
            self._run.journal.warn(
                f"the checkpoint was saved with snapshots every {saved['measured'][0]} steps and freezing stages every "
                f"{saved['measured'][1]}, this run has them every {now['measured'][0]} and {now['measured'][1]} steps: frozen layers stay "
                "frozen, and the policy starts anew. To continue it, set smartfrz.snapshot_interval and freeze_interval to the former"
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
    """Build the configured policy. Raises ValueError if it refuses the settings or the length of the run (steps, None: unknown)."""
    settings = dict(resolve(config, total_steps, provisional=config.policy == "manual").policy) | {
        key: getattr(config, key) for key in SHARED_SETTINGS.get(config.policy, ())
    }
    policy = make_policy(config.policy, settings)
    if isinstance(policy, ChecksStart):
        policy.check_start(total_steps, layer_infos(layers))
    return policy


def decide(
    policy: Policy, look: Callable[[], View], allow: Callable[[Sequence[str]], frozenset[str]], *, step: int
) -> tuple[Decision, frozenset[str], str]:
    """Return the policy's decision, the part of it that the rules `allow`, and why it failed. A policy that fails freezes nothing.

    look: makes the view, within the same safety: the other ranks wait for an answer.
    """
    try:
        view = look()
        decision = policy.decide(view)
        unknown = set(decision.freeze) - set(view.candidates)
        if unknown:
            raise ValueError(f"it named {sorted(unknown)}, which are not candidates")
        return decision, allow(decision.freeze), ""
    except Exception as error:
        return Decision(), frozenset(), f"policy {policy.name!r} failed at step {step}, nothing was frozen: {error}"


def broadcast_decision(ranks: Collectives, names: Sequence[str], own: tuple[Decision, frozenset[str], str], about: str) -> StageDecision:
    """Broadcast rank 0's outcome of `decide`, and see that every rank has heard the same. Collective.

    names: all layers. own: only rank 0's counts. about: step and frozen set, compared too.

    Raises:
        RanksDisagree: on all ranks.
    """
    decision, chosen, failure = own
    flags = [float(bool(failure))] + [float(name in chosen) for name in names]
    told = ranks.broadcast([*flags, *(decision.probabilities.get(name, float("nan")) for name in names)])
    heard = frozenset(name for name, flag in zip(names, told[1 : 1 + len(names)], strict=True) if flag)
    ranks.assert_same(f"{about}, decision {sorted(heard)}", "freezing decisions")
    known: dict[str, Any] = {n: p for n, p in zip(names, told[1 + len(names) :], strict=True) if p == p}
    told_failure = (failure or "rank 0: the policy failed; nothing was frozen") if told[0] else ""
    return StageDecision(chosen=heard, failure=told_failure, probabilities=known, reasons=dict(decision.reasons))
