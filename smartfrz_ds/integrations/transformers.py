"""Entry point for the Hugging Face Trainer: a callback.

With DeepSpeed, freezing must be enabled before the Trainer loads a checkpoint into the engine, and a callback receives the engine only
afterwards. Therefore deepspeed.initialize is hooked while the Trainer prepares, and only then. Without DeepSpeed the callback attaches to
the optimizer before the Trainer loads its state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from smartfrz_ds.checkpoint.files import SIDE_FILE
from smartfrz_ds.config.own import PolicyObject, with_object
from smartfrz_ds.config.settings import FreezeConfig, with_settings
from smartfrz_ds.model.hooks import ModuleHook
from smartfrz_ds.runtime.controller import Controller

from .deepspeed import ConfigSource
from .initialize_hook import engine_of, install_hook, remove_hook
from .torch import TorchController, attach_torch

# transformers/trainer.py: the last method that reads a checkpoint before training, and the one that writes after the model's weights
_LOAD, _SAVE = "_load_optimizer_and_scheduler", "_save_optimizer_and_scheduler"


class FreezeCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Freeze layers while a Trainer trains, with DeepSpeed (ZeRO 0 to 3), FSDP2, DDP or in one process.

    If `total_steps` is "auto", the length of the run is the Trainer's.

    Args:
        config: The settings: a dict, the path of a DeepSpeed JSON or a FreezeConfig. None: the "smartfrz" section of the DeepSpeed config
            that the Trainer uses, without DeepSpeed the defaults.
        probe_batch: As in `smartfrz_ds.attach`.
        settings: Single settings by name, which take precedence over `config`. `policy` may be an object of your own
            (`smartfrz_ds.Policy`).

    Attributes:
        controller: The controller of the current training, or of the last one. None before the first, and with `enabled: false`.

    Raises:
        ValueError: Wrong settings. Those in the DeepSpeed config are read when training starts.
        RuntimeError: This version of transformers lacks a method of the Trainer that the callback wraps.
    """

    def __init__(self, config: ConfigSource = None, *, probe_batch: Any = None, **settings: Any) -> None:
        _check_trainer()
        self.controller: Controller | None = None
        settings = with_object(settings)
        self._config, self._settings, self._probe_batch = config, settings, probe_batch
        # Without a config only names can be checked: the values are in a JSON that is not known yet.
        with_settings(config, settings if config is not None else {k: v for k, v in settings.items() if k not in FreezeConfig.model_fields})
        self._trainer: Any = None
        self._attached: TorchController | None = None  # if there is no DeepSpeed engine
        self._watch: Any = None
        self._sees_loss = False

    # --- before training ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer stores in its TrainerState, and prepare the hooks when train() begins.

        The Trainer calls it when it is built, when train() begins, before anything is prepared, and in a save.
        """
        if not _has(self._trainer, self):
            self._trainer = _trainer_of(self)
        trainer = self._trainer
        # accelerator.free_memory() has emptied this list when train() begins (accelerate/accelerator.py). In a save, which only rank 0
        # reaches, it contains the optimizer.
        if trainer is None or not trainer.accelerator._optimizers:
            self._prepare()
        return {"args": self._given(), "attributes": {}}

    def _given(self) -> dict[str, Any]:
        """Return the constructor's arguments, JSON-serializable."""
        config, policy = self._config, self._settings.get("policy")
        settings = self._settings | ({"policy": policy.in_a_trainers_state} if isinstance(policy, PolicyObject) else {})
        if isinstance(config, FreezeConfig):
            given = config.policy_object
            names = {} if given is None else {"policy": given.in_a_trainers_state}
            return {"config": config.model_dump(mode="json", exclude_unset=True) | names, **settings}
        return {"config": str(config) if isinstance(config, Path) else config, **settings}

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the hooks again: the Trainer is built, and prepares nothing before train()."""
        self._undo()

    def _prepare(self) -> None:
        self._undo()
        self._let_go()
        trainer = self._trainer
        if trainer is not None:
            callbacks = trainer.callback_handler.callbacks
            callbacks.sort(key=lambda other: other is not self)  # first, so that all callbacks see what this one adds to a log
            if (engine := engine_of(trainer.model)) is not None and hasattr(engine, "smartfrz"):
                engine.smartfrz.detach()  # of a training that was interrupted
        if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
            install_hook(self._settings_over, probe_batch=self._probe_batch, defer_policy=True)
        elif trainer is not None:
            _before_load(trainer)

    def _undo(self) -> None:
        remove_hook()
        if self._trainer is not None:
            self._trainer.__dict__.pop(_LOAD, None)

    def _settings_over(self, source: ConfigSource) -> FreezeConfig:
        return with_settings(source if self._config is None else self._config, self._settings)

    def _load(self, trainer: Any, checkpoint: str, load: Callable[[], None]) -> None:
        """Wrap the Trainer's loading of the optimizer, without DeepSpeed: the optimizer must hold the same parameters as at the save."""
        self._trainer = trainer
        settings, there = self._settings_over(None), (Path(checkpoint) / SIDE_FILE).is_file()
        if not settings.enabled and not there:
            load()
            return
        controller = self._attach(settings)
        if there:
            controller.restore(checkpoint)
        load()
        if not there:  # saved by a run without this callback
            controller.freeze_state.reset(trainer.state.global_step, checkpoint)

    def _attach(self, settings: FreezeConfig) -> TorchController:
        trainer = self._trainer
        self._attached = attach_torch(
            trainer.model_wrapped,
            trainer.optimizer,
            settings,
            scheduler=trainer.lr_scheduler,
            probe_batch=self._probe_batch,
            scaler=getattr(trainer.accelerator, "scaler", None),
            defer_policy=True,
        )
        self._attached.set_schedule(scheduler=trainer.lr_scheduler, total_steps=trainer.state.max_steps, told_by="the Trainer")
        setattr(trainer, _SAVE, partial(self._save, getattr(trainer, _SAVE)))
        return self._attached

    def _save(self, save: Callable[[str], None], folder: str) -> None:
        """Wrap the Trainer's saving of the optimizer, without DeepSpeed.

        The freeze state is written first, as the optimizer cannot be loaded without it: a run that is killed during a save never leaves an
        optimizer alone.
        """
        assert self._attached is not None
        self._attached.save(folder)
        save(folder)

    # --- training -------------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, lr_scheduler: Any = None, **_: Any) -> None:
        """Find the controller, after everything is prepared and a checkpoint is loaded.

        Raises:
            RuntimeError: The engine or the Trainer was created without this callback.
        """
        self._undo()
        if self._trainer is not None and self._trainer.state is not state:
            # One Trainer after the other has this callback. `state` must not take a save of this one for the start of a training.
            self._trainer = _trainer_of(self)
        if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
            engine = engine_of(model)
            if engine is None:
                raise RuntimeError("FreezeCallback: the DeepSpeed engine was created without it; pass it to the Trainer before train()")
            self.controller = getattr(engine, "smartfrz", None)
            if self.controller is not None:
                own = lr_scheduler if engine.lr_scheduler is None else None  # the Trainer's, which the engine does not know
                self.controller.set_schedule(scheduler=own, total_steps=state.max_steps, told_by="the Trainer")
            return
        settings = self._settings_over(None)
        if self._attached is None and settings.enabled:
            self._trainer = self._trainer or _trainer_of(self)
            if self._trainer is None:
                raise RuntimeError("FreezeCallback: no transformers.Trainer has it; without DeepSpeed it works only in one")
            self._attach(settings)
        self.controller = self._attached
        if self.controller is not None:
            self._watch = model.register_forward_hook(ModuleHook(self._saw_output, self.controller.backend.time))

    def _saw_output(self, module: Any, args: Any, output: Any) -> None:
        """Record the loss of a micro-batch. With DeepSpeed the engine's backward does that."""
        if module.training and self.controller is not None:
            loss = output.get("loss") if isinstance(output, dict) else None
            if loss is not None:
                self._sees_loss = True
                self.controller.record_loss(loss)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **_: Any) -> None:
        """Add `smartfrz/…` values to the Trainer's logs of a training step, and pass its metrics to the controller."""
        if self.controller is None:
            return
        # With a loss function of its own, the Trainer does not let the model compute a loss: then the logged one is used.
        seen = "" if self._watch is not None and not self._sees_loss else "loss"
        self.controller.observe(**{k: float(v) for k, v in logs.items() if isinstance(v, int | float) and k != seen})
        if "loss" not in logs and "train_loss" not in logs:
            return
        report = self.controller.report()
        more = {
            "smartfrz/frozen_layers": len(report.frozen),
            "smartfrz/saved_flops": report.saved_flops_fraction,
            "smartfrz/optimizer_bytes": report.optimizer_bytes,
        }
        logs.update(more)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(more)  # the Trainer has already put a copy there

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach the controller from the model."""
        self._undo()
        if self._attached is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._attached.freeze_state.weights_loaded(state.best_model_checkpoint)  # without DeepSpeed the Trainer loads them itself
        self._let_go()
        if self.controller is not None and not self.controller.released:
            self.controller.detach()

    def _let_go(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self._attached is not None:
            self._attached.detach()  # the Trainer's next training uses the same optimizer
            self._attached = None
            self._trainer.__dict__.pop(_SAVE, None)


def _has(trainer: Any, callback: FreezeCallback) -> bool:
    return any(c is callback for c in getattr(getattr(trainer, "callback_handler", None), "callbacks", ()))


def _trainer_of(callback: FreezeCallback) -> Any:
    """Return the Trainer that has this callback and one of whose methods is running, the innermost; None if there is none.

    A Trainer never tells a callback, but it is the caller, several frames up.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        # by type: isinstance would load a lazy object
        if issubclass(type(first), Trainer) and _has(first, callback):
            return first
        frame = frame.f_back
    return None


def _check_trainer() -> None:
    """Check that this transformers has the private methods of the Trainer that are wrapped without DeepSpeed.

    Raises:
        RuntimeError: It lacks one; names it and the version.
    """
    for name in (_LOAD, _SAVE):
        if not callable(getattr(Trainer, name, None)):
            raise RuntimeError(
                f"FreezeCallback: transformers {transformers.__version__} has no Trainer.{name}, which the callback wraps, so that the "
                "freeze state is saved and loaded with the optimizer; allowed: a version that has it, or attach_torch in a loop of your own"
            )


def _before_load(trainer: Any) -> None:
    """Wrap this trainer's loading of its optimizer in the callback, once."""

    def load(checkpoint: Any) -> None:
        del trainer.__dict__[_LOAD]
        plain = partial(getattr(trainer, _LOAD), checkpoint)
        # may be another object: the Trainer recreates callbacks when it restores their states
        now = next((c for c in trainer.callback_handler.callbacks if isinstance(c, FreezeCallback)), None)
        plain() if now is None or checkpoint is None else now._load(trainer, checkpoint, plain)

    setattr(trainer, _LOAD, load)
