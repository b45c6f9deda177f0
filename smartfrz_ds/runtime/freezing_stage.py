"""A freezing stage: the policy decides, and the freezer carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smartfrz_ds.runtime.observers.guard import GuardedRun, TakeBack
from smartfrz_ds.runtime.observers.protocol import StepObserver
from smartfrz_ds.telemetry.events import FreezeEvent

from .changes.freezer import Freezer
from .decision import StageDecision
from .policy_stage import PolicyStage
from .run_context import RunContext


class FreezingStages:
    """Holds the freezing stages of one run. Collective throughout.

    Args:
        run: The run.
        policy: The policy and its inputs.
        freezer: Changes the frozen set.
        observers: All observers.
    """

    def __init__(self, run: RunContext, policy: PolicyStage, freezer: Freezer, observers: Sequence[StepObserver]) -> None:
        self._run, self._policy, self._freezer, self._observers = run, policy, freezer, observers

    def begin(self) -> None:
        """Make the changes that are due before the first step; at a step boundary."""
        if self._policy.begins_now:
            self._carry_out(self._policy.judge(frozenset()), self._run.start_of_change())

    def hold(self, guard: GuardedRun | None) -> None:
        """Let the policy judge after a step, and make the changes that it has chosen.

        Args:
            guard: The guard, if there is one.
        """
        run, began = self._run, self._run.start_of_change()
        if self._policy.drop_schedule():
            for observer in self._observers:
                observer.on_schedule()
            if not self._policy.is_planned:
                return  # what the policy has seen so far counted on that length
        if guard is not None:
            guard.before_stage()
        if run.state.cooldown > 0 and not self._policy.is_planned:
            run.state.cooldown -= 1
            return
        if guard is not None and guard.guard.watching:
            return  # one freeze at a time, so that the guard knows which one it was
        self._carry_out(self._policy.judge(frozenset() if guard is None else guard.guard.waiting), began)

    def _carry_out(self, decision: StageDecision, began: float) -> None:
        run, reasons = self._run, decision.reasons
        # A thaw first only where the freeze alone would leave nothing to train: it needs more memory.
        both = run.state.frozen | decision.chosen
        leaves = any(layer.numel and layer.name not in both for layer in run.layers)
        if decision.thawed and not leaves:
            self._thaw(decision, began)
        self._freeze(decision, {"probabilities": decision.probabilities, "reasons": reasons}, began)
        if decision.thawed and leaves:
            self._thaw(decision, None if decision.chosen else began)

    def _freeze(self, decision: StageDecision, about: Mapping[str, Any], began: float) -> None:
        run = self._run
        frozen, dry_run = run.state.frozen | decision.chosen, run.config.dry_run
        begins = decision.chosen and not dry_run and self._freezer.can_cut(frozen)
        if begins and self._freezer.try_change(frozen, kind="freeze", about=about, began=began):
            run.state.cooldown = run.config.cooldown
        elif decision.chosen or decision.probabilities:
            layers = run.state.in_order(decision.chosen)
            run.journal.record(FreezeEvent(kind="decision", step=run.step, layers=layers, frozen=run.frozen, dry_run=dry_run, **about))

    def _thaw(self, decision: StageDecision, began: float | None) -> None:
        run, back = self._run, decision.thawed
        if not run.config.dry_run:
            self._freezer.try_change(
                run.state.frozen - back, kind="thaw", about={"reasons": decision.reasons}, began=began, adopt=back - run.state.frozen
            )

    def take_back(self, mistake: TakeBack) -> None:
        """Thaw the layers that the guard takes back."""
        reasons = dict.fromkeys(mistake.layers, mistake.reason)
        self._freezer.try_change(self._run.state.frozen - set(mistake.layers), kind="thaw", about={"reasons": reasons})
