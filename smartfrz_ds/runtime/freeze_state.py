"""The freeze state of a run, for checkpoints: its contents, and the steps of a load in their order.

check_state, restore_bounds (pipelines), restore_layout or restore_layout_of      before the engine's own load
resume, reset, or weights_loaded                                                  after it
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch.nn import Parameter

from smartfrz_ds.runtime.observers.protocol import StepObserver
from smartfrz_ds.runtime.rules.user_frozen import Restored, UserFrozen, whole_numel
from smartfrz_ds.signals.lr_forecast import current_lr

from .changes.freezer import Freezer
from .changes.stage_moves import StageMoves
from .policy_stage import PolicyStage
from .run_context import RunContext


class FreezeState:
    """Saves and loads the freeze state of one run. All is collective but `state_dict`."""

    def __init__(
        self,
        run: RunContext,
        users: UserFrozen,
        freezer: Freezer,
        policy: PolicyStage,
        moves: StageMoves | None,
        observers: Sequence[StepObserver],
    ) -> None:
        self._run, self._users, self._freezer, self._policy, self._moves = run, users, freezer, policy, moves
        self._observers = observers

    # --- saving ---------------------------------------------------------------------------------------------------------------

    @property
    def keeps_released(self) -> bool:
        """Whether released optimizer state is held back for a thaw."""
        return self._run.keep_steps > 0

    def sync(self) -> None:
        """Collect on rank 0 the data that the ranks hold separately, before its state is saved for all."""
        for observer in self._observers:
            observer.sync_for_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, names, and on rank 0 the history's tensors."""
        sizes = [whole_numel(layer) for layer in self._run.layers]
        state = self._run.state.state_dict() | {"sizes": sizes, "user_frozen": self._users.state_dict(), "guard": None}
        for observer in self._observers:
            state |= observer.state_dict()
        return state

    # --- before the engine loads ----------------------------------------------------------------------------------------------

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if a freeze state does not match this model."""
        run = self._run
        names = run.state.layers
        if tuple(state["layers"]) != names:
            raise ValueError(
                f"the freeze state does not match this model: the checkpoint has layers {state['layers']}, the model has {list(names)}"
            )
        # The user may have frozen a layer then and not now: all weights count. Older states count trainable weights only.
        own = [whole_numel(layer) if "user_frozen" in state else layer.numel for layer in run.layers]
        for name, theirs, ours in zip(names, state.get("sizes", own), own, strict=True):
            if theirs != ours:
                raise ValueError(
                    f"the freeze state does not match this model: layer {name!r} has {theirs} weights in the checkpoint, "
                    f"{ours} in the model"
                )
        run.ranks.assert_same(f"load frozen {state['frozen']} at step {state['step']}", "freeze states to load")

    def leaving(self, frozen: Collection[str]) -> tuple[Parameter, ...]:
        """Return the parameters that are out of the optimizer when exactly these layers are frozen."""
        return self._freezer.leaving(frozen)

    def restore_layout(self, frozen: Iterable[str]) -> None:
        """Call `Freezer.restore`."""
        self._freezer.restore(frozen)

    def restore_layout_of(self, state: Mapping[str, Any], *, by_position: bool = False) -> Restored:
        """Call `Freezer.restore_of`."""
        return self._freezer.restore_of(state, by_position=by_position)

    def return_to_user(self, names: Iterable[str]) -> None:
        """Call `Freezer.return_to_user`."""
        self._freezer.return_to_user(names)

    def restore_bounds(self, bounds: Sequence[int] | None) -> None:
        """Call `StageMoves.restore_bounds`; in a pipeline only."""
        assert self._moves is not None
        self._moves.restore_bounds(bounds)

    # --- after it -------------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All steps, where the engine loads nothing in between."""
        self.check_state(state)
        self.return_to_user(self.restore_layout_of(state).were_users)
        self.resume(state)

    def resume(self, state: Mapping[str, Any], folder: str = "") -> None:
        """Continue from a freeze state whose layout and tensors are in place: counts, the policy's state, history, the log's position.

        Args:
            state: The freeze state.
            folder: Folder of the checkpoint, for the record.
        """
        run, left = self._run, self._run.state.step
        run.state.load_state_dict(state, current_lr(run.backend.base_optimizer()))
        for observer in self._observers:
            observer.load_state_dict(state)
        self._record(left, state, folder)
        self._policy.load_policy_state(state)

    def reset(self, step: int, folder: str = "") -> None:
        """Start over with no history, after loading a checkpoint that has no freeze state.

        Args:
            step: The step of the checkpoint.
            folder: Folder of the checkpoint, for the record.
        """
        run, left = self._run, self._run.state.step
        run.state.reset(step, current_lr(run.backend.base_optimizer()))
        for observer in self._observers:
            observer.reset()
        self._record(left, None, folder)

    def weights_loaded(self, folder: str) -> None:
        """Record that only weights were loaded from a checkpoint: the run stays what it is."""
        self._freezer.layout_before_load()
        self._run.journal.loaded(self._run.state.step, folder, set(), weights_only=True)

    def _record(self, left: int, state: Mapping[str, Any] | None, folder: str) -> None:
        run, before = self._run, self._freezer.layout_before_load()
        if run.journal.trained:
            run.journal.loaded(left, folder, run.state.frozen ^ before)
        else:
            run.journal.resumed(state, folder)
