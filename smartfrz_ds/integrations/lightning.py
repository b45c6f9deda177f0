"""Entry point for PyTorch Lightning: a callback, for `lightning.pytorch` and `pytorch_lightning`.

It attaches in `on_fit_start`, when the strategy has built model and optimizer. DeepSpeed, FSDP and ModelParallel load a checkpoint after
that; the other strategies load the optimizer after that, and the weights before. The freeze state is in Lightning's own checkpoint: with
DeepSpeed beside the engine's files, else under the key "smartfrz".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakMethod, ref

import torch
from torch import Tensor, nn

from smartfrz_ds.checkpoint.torch import restore_object, state_object
from smartfrz_ds.config.own import with_object
from smartfrz_ds.config.settings import FreezeConfig, with_settings
from smartfrz_ds.runtime.controller import Controller

from .closures import run_closures_first
from .lightning_trainer import MovesLess, call_by_forward, check_callbacks, kind_of, sharded_root, steps_per_move
from .torch import TorchController, attach_torch

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_KEY = "smartfrz"  # in Lightning's checkpoint
_LATE = (
    "LightningFreezeCallback: fit() began without it; allowed: pass it in Trainer(callbacks=[...]), or append it to trainer.callbacks "
    "before fit()"
)
# What ends the last fit() of each module: another callback may have begun it, and it may have been interrupted.
_ENDS: WeakKeyDictionary[nn.Module, WeakMethod[Callable[[], Any]]] = WeakKeyDictionary()


def _bases() -> tuple[Any, ...]:
    """Return the class Callback of each Lightning that is loaded; where none is, of one that is installed.

    Raises:
        ImportError: Neither is installed.
    """
    loaded = [name for name in _PACKAGES if name in sys.modules] or [n for n in _PACKAGES if find_spec(n.split(".")[0])][:1]
    if not loaded:
        raise ImportError("LightningFreezeCallback requires PyTorch Lightning: pip install 'smartfrz_ds[lightning]'")
    return tuple(import_module(name).Callback for name in loaded)


_Callback: Any = type("_Callback", _bases(), {})


class LightningFreezeCallback(_Callback):  # type: ignore[misc]
    """Freeze layers while a Lightning Trainer fits, with DeepSpeed (ZeRO 0 to 3), FSDP, ModelParallel (FSDP2), DDP or one device.

    If `total_steps` is "auto", the length of the run is `trainer.estimated_stepping_batches`.

    Args:
        config: The settings: a dict, the path of a DeepSpeed JSON or a FreezeConfig. None: the "smartfrz" section of the DeepSpeed config
            that the strategy uses, without DeepSpeed the defaults.
        probe_batch: As in `smartfrz_ds.attach`.
        settings: Single settings by name, which take precedence over `config`. `policy` may be an object of your own
            (`smartfrz_ds.Policy`).

    Attributes:
        controller: The controller of the current fit(), or of the last one. None before the first, and with `enabled: false`.

    Raises:
        ValueError: Wrong settings. Those in the DeepSpeed config are read when fit() starts.
    """

    def __init__(self, config: Any = None, *, probe_batch: Any = None, **settings: Any) -> None:
        self.controller: Controller | None = None
        settings = with_object(settings)
        self._config, self._settings, self._probe_batch = config, settings, probe_batch
        # Without a config only names can be checked: the values are in a JSON that is not known yet.
        with_settings(config, settings if config is not None else {k: v for k, v in settings.items() if k not in FreezeConfig.model_fields})
        self._kind = ""
        self._fitting = False
        self._loaded: Any = None  # the freeze state in the checkpoint that is loaded; None: there is no checkpoint, {}: it has none
        self._final: dict[str, Any] | None = None  # freeze state at the end of the last fit(), for save_checkpoint after it
        self._module: ReferenceType[Any] | None = None  # whose state that is
        self._handles: list[Any] = []
        self._wrapped: list[tuple[Any, str]] = []  # objects with an attribute that hides a method of theirs
        self._validated: dict[str, Any] = {}
        self._from_validation: set[str] = set()
        self._shown: tuple[int, int] = (-1, -1)  # step and number of frozen layers at the last log

    # --- before training ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the Trainer, and end what an interrupted fit() has left.

        Raises:
            ValueError: The strategy is not supported, or another callback freezes too.
        """
        self._loaded, self._fitting = None, False
        if stage != "fit":
            return
        self._final, self._shown = None, (-1, -1)
        self._kind = kind_of(trainer.strategy)
        check_callbacks(trainer.callbacks, self)
        if len(set(map(id, (cb for cb in trainer.callbacks if isinstance(cb, LightningFreezeCallback))))) > 1:
            raise ValueError("callbacks: got several LightningFreezeCallbacks; allowed: one")
        self._let_go()
        if (known := _ENDS.pop(pl_module, None)) is not None and (end := known()) is not None:
            end()
        self.controller = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the engine or the optimizer, and restore the frozen set of a checkpoint before its optimizer is loaded.

        Raises:
            ValueError: Wrong settings, or a model or optimizer that freezing does not support.
        """
        self._fitting = True
        if self._kind == "deepspeed":
            from .deepspeed import attach  # a run without DeepSpeed does not import it

            engine = trainer.strategy.model
            settings = with_settings(engine.config if self._config is None else self._config, self._settings)
            attach(engine, settings, probe_batch=self._probe_batch, defer_policy=True)
            # Lightning drops an engine without this, and the engine's hooks on the parameters would act in the next fit().
            _ENDS[pl_module] = WeakMethod(engine.destroy)
            return
        settings = with_settings(self._config, self._settings)
        if self._kind in ("fsdp1", "fsdp2"):
            self._wrap(trainer.strategy, "load_checkpoint", self._load_checkpoint(trainer, pl_module, settings))
        if settings.enabled or self._loaded:
            self._attach(trainer, pl_module, settings)
        if self._loaded and not self._restores_later:
            self._restore(str(trainer.ckpt_path))

    @property
    def _restores_later(self) -> bool:
        """Whether the frozen set is restored after the optimizer is loaded: it was saved after fit(), when all layers were in it again."""
        return bool(self._loaded) and self._loaded["ended"] and self._kind != "fsdp2"  # where the load asks for the states of all

    def _load_checkpoint(self, trainer: Any, pl_module: Any, settings: FreezeConfig) -> Any:
        """Return the strategy's load_checkpoint, which first restores the frozen set: it loads weights and optimizer in one."""
        plain = trainer.strategy.load_checkpoint

        def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            path = str(trainer.strategy.broadcast(checkpoint_path))
            self._loaded = _read(path)
            if self._loaded and self.controller is None:
                self._attach(trainer, pl_module, settings)
            if self._loaded and not self._restores_later:
                self._restore(path)
            return plain(checkpoint_path, *args, **kwargs)

        return load_checkpoint

    def _restore(self, path: str) -> None:
        assert isinstance(self.controller, TorchController) and self._loaded is not None
        restore_object(self.controller, self.controller.backend, self._loaded, path)

    def _attach(self, trainer: Any, pl_module: Any, settings: FreezeConfig) -> None:
        # pytorch/core/optimizer.py: _MockOptimizer is there if configure_optimizers returns None
        optimizers = [optimizer for optimizer in trainer.optimizers if type(optimizer).__name__ != "_MockOptimizer"]
        if not optimizers:
            raise ValueError("configure_optimizers: got no optimizer; allowed: one or several torch optimizers, or `enabled=False`")
        self._handles = [run_closures_first(optimizer) for optimizer in optimizers]
        try:
            self.controller = attach_torch(
                trainer.strategy.model,
                optimizers[0] if len(optimizers) == 1 else optimizers,
                settings,
                probe_batch=self._probe_batch,
                scaler=getattr(trainer.precision_plugin, "scaler", None),
                defer_policy=True,
            )
        except BaseException:
            self._let_go()
            raise
        _ENDS[pl_module] = WeakMethod(self.controller.detach)
        self._wrap(trainer.strategy, "training_step", self._training_step(trainer, pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the freeze state out of a checkpoint."""
        if not self._fitting:  # else it is a strategy that loads after on_fit_start, which has read the freeze state
            self._loaded = checkpoint.get(_KEY, {})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the freeze state to a checkpoint. Collective."""
        if self._final is not None:
            if self._module is not None and self._module() is pl_module:
                checkpoint[_KEY] = self._final
        elif isinstance(controller := self.controller, TorchController) and not controller.released:
            checkpoint[_KEY] = state_object(controller, controller.backend) | {"ended": False}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the controller the schedule, after everything is loaded.

        Raises:
            RuntimeError: The callback was added after fit() began.
        """
        self._check_in_time()
        if self._kind == "deepspeed":
            self.controller = getattr(trainer.strategy.model, "smartfrz", None)
        controller = self.controller
        if controller is None:
            return
        self._module = ref(pl_module)
        self._wrap(trainer.strategy, "teardown", self._teardown(trainer, trainer.strategy.teardown))
        if isinstance(controller, TorchController):
            if self._restores_later:
                self._restore(str(trainer.ckpt_path))
            elif self._loaded == {}:  # saved by a run without this callback
                controller.freeze_state.reset(trainer.global_step, str(trainer.ckpt_path))
        self._loaded = None
        steps = trainer.estimated_stepping_batches
        controller.set_schedule(
            scheduler=self._scheduler(trainer, controller),
            total_steps=int(steps) if 0 < steps < float("inf") else None,
            told_by="the Lightning Trainer",
        )

    @staticmethod
    def _scheduler(trainer: Any, controller: Controller) -> Any:
        """Return the first scheduler as Lightning moves it, None where its future depends on a metric."""
        for config in trainer.lr_scheduler_configs:
            every = steps_per_move(trainer, config)
            if every is None:
                return None
            return config.scheduler if every == 1 else MovesLess(config.scheduler, every, lambda: controller.step)
        return None

    # --- training -------------------------------------------------------------------------------------------------------------

    def _training_step(self, trainer: Any, pl_module: Any) -> Any:
        """Return the strategy's training_step, which also records the loss, and enters the module as a wrapper would."""
        plain = trainer.strategy.training_step
        direct = trainer.strategy.model is pl_module and not sharded_root(pl_module)

        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = call_by_forward(pl_module, plain, args, kwargs) if direct else plain(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, dict) else output
            if isinstance(loss, Tensor) and self.controller is not None:
                self.controller.record_loss(loss)
            return output

        return training_step

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that fit() began with this callback."""
        self._check_in_time()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check that fit() began with this callback."""
        self._check_in_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log `smartfrz/…` values every `log_every_n_steps` and after a freeze, and pass logged metrics to the controller."""
        controller = self.controller
        if controller is None or (now := (controller.step, len(controller.frozen))) == self._shown:
            return
        due = trainer.log_every_n_steps > 0 and now[0] != self._shown[0] and now[0] % trainer.log_every_n_steps == 0
        if not due and now[1] == self._shown[1]:
            return
        self._shown = now
        if due:
            fresh = {k: v for k, v in trainer.callback_metrics.items() if k not in self._from_validation and not k.startswith(_KEY)}
            controller.observe(**_numbers(fresh))
        if trainer.barebones:
            return  # where self.log is not allowed
        report = controller.report()
        pl_module.log(f"{_KEY}/frozen_layers", float(now[1]), on_step=True, on_epoch=False, prog_bar=True)
        more = {f"{_KEY}/saved_flops": report.saved_flops_fraction, f"{_KEY}/optimizer_bytes": float(report.optimizer_bytes)}
        pl_module.log_dict(more, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the metrics, to recognize those of this validation."""
        self._validated = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Pass the metrics of a validation to the controller."""
        fresh = {k: v for k, v in trainer.callback_metrics.items() if self._validated.get(k) is not v}
        self._from_validation.update(fresh)
        if self.controller is not None and not self.controller.released and not trainer.sanity_checking:
            self.controller.observe(**_numbers(fresh))

    def _check_in_time(self) -> None:
        if not self._fitting:
            raise RuntimeError(_LATE)

    # --- after training -------------------------------------------------------------------------------------------------------

    def _teardown(self, trainer: Any, plain: Any) -> Any:
        """Return the strategy's teardown, which first detaches the controller: the last callbacks have saved, and the model is in place."""

        def teardown() -> None:
            fitting, self._fitting = self._fitting, False
            if fitting and not trainer.interrupted:
                self._end()
            else:
                self._let_go()
            plain()

        return teardown

    def _end(self) -> None:
        controller = self.controller
        if isinstance(controller, TorchController):
            self._final = state_object(controller, controller.backend) | {"ended": True}
        self._let_go()
        if controller is not None:
            controller.detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Note that fit() has ended."""
        if stage == "fit":
            self._fitting = False

    def _wrap(self, owner: Any, name: str, function: Any) -> None:
        setattr(owner, name, function)
        self._wrapped.append((owner, name))

    def _let_go(self) -> None:
        """Remove what this callback has put on the Trainer and its optimizers."""
        for owner, name in self._wrapped:
            vars(owner).pop(name, None)
        for handle in self._handles:
            handle.remove()
        self._wrapped, self._handles = [], []


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _read(path: str) -> dict[str, Any]:
    """Read the freeze state out of a checkpoint of FSDPStrategy or ModelParallelStrategy, before the strategy loads it.

    Args:
        path: A file with everything, or a folder whose `meta.pt` has everything but weights and optimizer.

    Returns:
        The freeze state; {} if there is none.
    """
    file = Path(path)
    if file.is_dir():  # lightning/fabric/strategies/fsdp.py: _METADATA_FILENAME
        return dict(torch.load(file / "meta.pt", map_location="cpu").get(_KEY, {}))
    # Lightning reads this file with its own unpickler, which executes what it contains too (fabric/utilities/load.py: _lazy_load).
    return dict(torch.load(file, map_location="cpu", mmap=True, weights_only=False).get(_KEY, {}))
