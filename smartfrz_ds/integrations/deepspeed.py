"""initialize and attach: a freezing engine is its DeepSpeed class plus one mixin.

The object's class is swapped (as torch's fully_shard does), so it stays what it was: the same object, isinstance holds, and every
handle that somebody else has stays valid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch.nn import Module
from torch.optim import Optimizer

from smartfrz_ds._version import __version__
from smartfrz_ds.backends.deepspeed.complete_checkpoints import CompleteCheckpoints
from smartfrz_ds.backends.factory import make_backend
from smartfrz_ds.backends.pipeline.stage import PrunedPipeline
from smartfrz_ds.checkpoint.deepspeed import Checkpoints, find_together, hide_marker
from smartfrz_ds.checkpoint.files import MARKER
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.failures import compare_before_start, explained, share_timeout
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.policies import POLICIES, SetsLr
from smartfrz_ds.runtime.controller import Controller
from smartfrz_ds.signals.lr_scale import layer_groups

from .build_locks import clear as clear_build_locks

EngineT = TypeVar("EngineT", bound=DeepSpeedEngine)
ConfigSource = FreezeConfig | Mapping[str, Any] | str | Path | None


class FreezingMixin(CompleteCheckpoints):
    """What a freezing engine does beyond its DeepSpeed class. Signatures are DeepSpeed's."""

    smartfrz: Controller

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeedEngine.backward; the guard sees the loss."""
        self.smartfrz.record_loss(loss)
        with explained(self.smartfrz, "backward"):
            return super().backward(loss, *args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeedEngine.forward."""
        with explained(self.smartfrz, "forward"):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeedEngine.step, then the controller if that was a successful optimizer update (not a micro-batch, not a skipped one)."""
        with explained(self.smartfrz, "the optimizer's step"):
            return self._step_and_watch(*args, **kwargs)

    def _step_and_watch(self, *args: Any, **kwargs: Any) -> Any:
        # Without managed accumulation every step() is a boundary (runtime/engine.py).
        boundary = not self.managed_gradient_accumulation() or self.is_gradient_accumulation_boundary()  # type: ignore[attr-defined]
        if boundary:
            self.smartfrz.before_step()
        result = super().step(*args, **kwargs)  # type: ignore[misc]
        if self.was_step_applied():  # type: ignore[attr-defined]
            self.smartfrz.after_step()
        elif boundary:
            self.smartfrz.step_skipped()
        return result

    def destroy(self) -> Any:
        """DeepSpeedEngine.destroy; the model is the user's again, all of it trainable, so that another engine can take it."""
        self.smartfrz.detach()
        return super().destroy()  # type: ignore[misc]

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            super().destroy()  # type: ignore[misc] # another engine may have the model by now

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """DeepSpeedEngine.save_checkpoint with the freeze state beside it (checkpoint.py, resume.py). Collective.

        Raises:
            ValueError: client_state has the key "smartfrz_ds", which is this package's.
            OSError or RuntimeError: a rank can't write one of the files, on every rank; the checkpoint before is whole.
        """
        client_state = dict(client_state or {})
        if MARKER in client_state:
            raise ValueError(f"client_state: got the key {MARKER!r}, which smartfrz_ds uses itself; allowed: any other key")
        # DeepSpeed's own default, runtime/engine.py
        tag = str(tag) if tag is not None else f"global_step{self.global_steps}"  # type: ignore[attr-defined]
        self.smartfrz.restore_flags()  # DeepSpeed takes what is frozen from the flags
        leaving_out = self._leaving_out(exclude_frozen_parameters)
        saved = self._checkpoints.saved(save_dir, tag, save_latest=save_latest)
        with explained(self.smartfrz, "save_checkpoint"), saved as marker, leaving_out as exclude:
            # `latest` is written by us, in one piece: DeepSpeed truncates and rewrites it.
            return super().save_checkpoint(  # type: ignore[misc]
                save_dir,
                tag=tag,
                client_state=client_state | {MARKER: marker},
                save_latest=False,
                exclude_frozen_parameters=exclude,
            )

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, Any]:
        """DeepSpeedEngine.load_checkpoint; before it the frozen set becomes the checkpoint's, after it the freeze state does. Collective.

        A checkpoint without a freeze state (made without this package) thaws everything. With load_module_only the frozen set and the
        freeze state stay as they are, and only weights are loaded.

        Raises:
            ValueError: the tag is incomplete, its freeze state is missing, damaged or of another model, or it is of another number of
                ranks; nothing was changed.
            RuntimeError: not at a step boundary, and the frozen set would have to change; nothing was changed.
        """
        settings = {
            "load_module_strict": load_module_strict,
            "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states,
            "load_module_only": load_module_only,
            "custom_load_fn": custom_load_fn,
        }
        universal = bool(self.load_universal_checkpoint())  # type: ignore[attr-defined]
        found = find_together(self._checkpoints.ranks, load_dir, tag, universal=universal)
        if found is None:
            return super().load_checkpoint(load_dir, tag=None, **settings)  # type: ignore[misc]
        with self._checkpoints.loaded(load_dir, found, universal=universal, module_only=load_module_only, optimizer=load_optimizer_states):
            path, client_state = super().load_checkpoint(load_dir, tag=found.tag, **settings)  # type: ignore[misc]
        return path, hide_marker(client_state)

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.smartfrz)


class FreezingPipelineMixin(PrunedPipeline, FreezingMixin):
    """What a freezing PipelineEngine does beyond its DeepSpeed class."""

    def train_batch(self, data_iter: Any = None) -> Any:
        """PipelineEngine.train_batch, then the controller if that was a successful optimizer update."""
        with explained(self.smartfrz, "train_batch"):
            loss = super().train_batch(data_iter)  # type: ignore[misc]
            self.smartfrz.record_loss(loss)
            if self.was_step_applied():  # type: ignore[attr-defined]
                self.smartfrz.after_step()
            else:
                self.smartfrz.step_skipped()
            return loss


class RestoringMixin:
    """What is left with `enabled: false`: nothing is watched and nothing decided, but checkpoints of runs that froze load."""

    _smartfrz_settings: FreezeConfig

    def load_checkpoint(self, load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
        """DeepSpeedEngine.load_checkpoint; a checkpoint with frozen layers turns the engine into a freezing one without a policy.

        Raises: as FreezingMixin.load_checkpoint.
        """
        if isinstance(self, FreezingMixin):
            return super().load_checkpoint(load_dir, tag, *args, **kwargs)  # type: ignore[misc]
        universal = bool(self.load_universal_checkpoint())  # type: ignore[attr-defined]
        found = find_together(Collectives(self.device), load_dir, tag, universal=universal)  # type: ignore[attr-defined]
        parts = list(getattr(self.module, "parts", []))  # type: ignore[attr-defined]
        if found is not None and found.state is not None and (found.state["frozen"] or (found.state.get("parts") or parts) != parts):
            _turn_on(self, self._smartfrz_settings.model_copy(update={"policy": "manual"}))
            return self.load_checkpoint(load_dir, found.tag, *args, **kwargs)
        path, client_state = super().load_checkpoint(load_dir, found.tag if found else tag, *args, **kwargs)  # type: ignore[misc]
        return path, hide_marker(client_state)


def initialize(
    *args: Any,
    smartfrz: ConfigSource = None,
    probe_batch: Any = None,
    **kwargs: Any,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """As deepspeed.initialize, with freezing on.

    smartfrz: the settings, where they are not in the "smartfrz" section of the DeepSpeed config. probe_batch: as of `attach`.
    A policy that scales the learning rates of layers gets a parameter group for each layer, where neither `model_parameters` nor an
    optimizer object is given.
    Returns the tuple (engine, optimizer, dataloader, lr_scheduler) of deepspeed.initialize.

    Raises:
        ValueError: wrong settings, before the engine is built; a model or an engine that freezing does not work with.
        RanksDisagree: the ranks differ in package versions, settings or models.
    """
    clear_build_locks()
    source = _config_of(args, kwargs)
    settings = FreezeConfig.load(smartfrz if smartfrz is not None else source)
    model = kwargs.get("model", args[1] if len(args) > 1 else None)
    model = None if isinstance(model, PipelineModule) else model
    compare_before_start(model, settings, source, deepspeed_version=deepspeed.__version__)
    # Through the module, so that a hook of `python -m smartfrz_ds` is seen as a freezing engine made twice, not as two of them.
    engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **_with_groups(settings, args, kwargs))
    return attach(engine, settings, probe_batch=probe_batch), optimizer, loader, scheduler


def attach(
    engine: EngineT, config: ConfigSource = None, *, probe_batch: Any = None, defer_policy: bool = False, later: bool = False
) -> EngineT:
    """Turn freezing on for an engine that exists. Collective; the engine itself is changed and returned.

    config: the settings; None takes the "smartfrz" section of the engine's own JSON.
    probe_batch: inputs on which the layers' outputs are compared (`smartfrz.probe` of them): what the model's forward takes, a tensor, a
        tuple of positional arguments or a dict of keyword arguments, in the dtype that the model wants. On every rank, of
        the same shapes; rank 0's counts.
    defer_policy: the scheduler and the length of the run come with `engine.smartfrz.set_schedule(…)`, before the first step.
    later: deprecated, the former name of defer_policy.
    With `enabled: false` the engine stays a plain one, but for this: it still loads the checkpoint of a run that froze.

    Raises:
        ValueError: wrong settings; a model or an engine that freezing does not work with, by name.
        RanksDisagree: the ranks differ in settings, package version or layers.
    """
    if isinstance(engine, FreezingMixin):
        return engine
    if not isinstance(engine, DeepSpeedEngine):
        raise ValueError(f"attach takes a DeepSpeed engine, got {type(engine).__name__}")
    # engine.config: the dict that DeepSpeed parsed (runtime/engine.py)
    settings = FreezeConfig.load(engine.config if config is None else config)
    if settings.enabled:
        _turn_on(engine, settings, probe_batch, defer_policy=defer_policy or later)
    elif not isinstance(engine, RestoringMixin):
        engine._smartfrz_settings = settings
        engine.__class__ = type(f"Restoring{type(engine).__name__}", (RestoringMixin, type(engine)), {})
    return engine


def _turn_on(engine: Any, settings: FreezeConfig, probe_batch: Any = None, *, defer_policy: bool = False) -> None:
    share_timeout()
    backend = make_backend(engine, zero3_frozen=settings.zero3.frozen, allow_untested_versions=settings.allow_untested_versions)
    engine.smartfrz = Controller(
        engine.module,
        backend,
        settings,
        scheduler=engine.lr_scheduler,
        monitor=engine.monitor,
        probe_batch=probe_batch,
        version=__version__,
        defer_policy=defer_policy,
    )
    mixin: type = FreezingPipelineMixin if isinstance(engine, PipelineEngine) else FreezingMixin
    engine.__class__ = type(f"Freezing{type(engine).__name__}", (mixin, type(engine)), {})


def _with_groups(settings: FreezeConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of deepspeed.initialize, with a parameter group for each layer where the policy needs that and may have it."""
    # deepspeed/__init__.py: initialize(args, model, optimizer, model_parameters, ...)
    given = dict(zip(("args", "model", "optimizer", "model_parameters"), args, strict=False)) | kwargs
    own = given.get("model_parameters") is not None or isinstance(given.get("optimizer"), Optimizer)
    wanted = settings.enabled and not settings.dry_run and issubclass(POLICIES[settings.policy], SetsLr)
    model = given.get("model")
    if own or not wanted or len(args) > 3 or not isinstance(model, Module) or isinstance(model, PipelineModule):
        return kwargs
    return kwargs | {"model_parameters": layer_groups(find_layers(model, settings.layers))}


def _config_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ConfigSource:
    """The config among the arguments of deepspeed.initialize (deepspeed/__init__.py: config, config_params, args.deepspeed_config)."""
    for name in ("config", "config_params"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    parsed = kwargs.get("args") or (args[0] if args else None)
    for name in ("deepspeed_config", "deepscale_config"):
        if getattr(parsed, name, None) is not None:
            return getattr(parsed, name)
    return {}
