"""initialize and attach: a freezing engine is its DeepSpeed class plus one mixin.

The object's class is replaced (as torch's fully_shard does). It remains the same object: isinstance holds, and every handle that other
code has stays valid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch.nn import Module
from torch.optim import Optimizer

from smartfrz_ds._version import __version__
from smartfrz_ds.backends.deepspeed.compat import config_of
from smartfrz_ds.backends.deepspeed.complete_checkpoints import CompleteCheckpoints
from smartfrz_ds.backends.deepspeed.names import managed_accumulation
from smartfrz_ds.backends.factory import check_start, make_backend
from smartfrz_ds.backends.pipeline.stage import PrunedPipeline
from smartfrz_ds.checkpoint.deepspeed import Checkpoints, find_together, hide_marker
from smartfrz_ds.checkpoint.files import MARKER
from smartfrz_ds.config.own import by_name
from smartfrz_ds.config.settings import FreezeConfig, with_settings
from smartfrz_ds.config.versions import untested
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.devices import collective_device
from smartfrz_ds.distributed.failures import compare_before_start, explained, share_timeout
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.policies import Policy, SetsLr, policy_class
from smartfrz_ds.runtime.controller import Controller
from smartfrz_ds.signals.lr_scale import layer_groups

from .build_locks import clear as clear_build_locks
from .selfcheck import judge
from .selfcheck.case import Case, of_config

EngineT = TypeVar("EngineT", bound=DeepSpeedEngine)
ConfigSource = FreezeConfig | Mapping[str, Any] | str | Path | None


class FreezingMixin(CompleteCheckpoints):
    """The methods that a freezing engine adds to its DeepSpeed class. The signatures are DeepSpeed's."""

    smartfrz: Controller

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Call DeepSpeedEngine.backward, and record the loss."""
        self.smartfrz.record_loss(loss)
        with explained(self.smartfrz, "backward"):
            return super().backward(loss, *args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call DeepSpeedEngine.forward."""
        with explained(self.smartfrz, "forward"):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Call DeepSpeedEngine.step, then the controller if the optimizer was updated."""
        with explained(self.smartfrz, "the optimizer's step"):
            return self._step_and_watch(*args, **kwargs)

    def _step_and_watch(self, *args: Any, **kwargs: Any) -> Any:
        # Without managed accumulation every step() is a boundary (runtime/engine.py).
        boundary = not managed_accumulation(self) or self.is_gradient_accumulation_boundary()  # type: ignore[attr-defined]
        if boundary:
            self.smartfrz.before_step()
        result = super().step(*args, **kwargs)  # type: ignore[misc]
        if self.was_step_applied():  # type: ignore[attr-defined]
            self.smartfrz.after_step()
        elif boundary:
            self.smartfrz.step_skipped()
        return result

    def destroy(self) -> Any:
        """Call DeepSpeedEngine.destroy, and make the model trainable again, so that another engine can use it."""
        self.smartfrz.detach()
        return super().destroy()  # type: ignore[misc]

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            super().destroy()  # type: ignore[misc] # another engine may be using the model

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """Call DeepSpeedEngine.save_checkpoint, and write the freeze state beside it (checkpoint/). Collective.

        Args:
            save_dir: As in DeepSpeedEngine.save_checkpoint.
            tag: As in DeepSpeedEngine.save_checkpoint.
            client_state: As in DeepSpeedEngine.save_checkpoint, without the key "smartfrz_ds".
            save_latest: As in DeepSpeedEngine.save_checkpoint.
            exclude_frozen_parameters: As in DeepSpeedEngine.save_checkpoint.

        Raises:
            ValueError: `client_state` has the key "smartfrz_ds", which this package uses.
            OSError, RuntimeError: Some rank cannot write a file. Raised on every rank; the previous checkpoint is intact.
        """
        client_state = dict(client_state or {})
        if MARKER in client_state:
            raise ValueError(f"client_state: got the key {MARKER!r}, which smartfrz_ds uses itself; allowed: any other key")
        # DeepSpeed's own default, runtime/engine.py
        tag = str(tag) if tag is not None else f"global_step{self.global_steps}"  # type: ignore[attr-defined]
        self.smartfrz.restore_flags()  # DeepSpeed reads the frozen parameters off the flags
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
        """Restore the checkpoint's frozen set, call DeepSpeedEngine.load_checkpoint, and restore the freeze state. Collective.

        A checkpoint without a freeze state (saved without this package) thaws everything. With `load_module_only` only weights are loaded;
        the frozen set and the freeze state do not change.

        Args:
            load_dir: As in DeepSpeedEngine.load_checkpoint.
            tag: As in DeepSpeedEngine.load_checkpoint; None also falls back to the newest complete tag, with a warning.
            load_module_strict: As in DeepSpeedEngine.load_checkpoint.
            load_optimizer_states: As in DeepSpeedEngine.load_checkpoint.
            load_lr_scheduler_states: As in DeepSpeedEngine.load_checkpoint.
            load_module_only: As in DeepSpeedEngine.load_checkpoint.
            custom_load_fn: As in DeepSpeedEngine.load_checkpoint.

        Returns:
            The path and the client state, as DeepSpeedEngine.load_checkpoint does.

        Raises:
            ValueError: The tag is incomplete, its freeze state is missing, damaged or of another model, or it was saved by another number
                of ranks. Nothing was changed.
            RuntimeError: The frozen set would have to change, and this is not a step boundary. Nothing was changed.
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
    """The methods that a freezing PipelineEngine adds to its DeepSpeed class."""

    def train_batch(self, data_iter: Any = None) -> Any:
        """Call PipelineEngine.train_batch, then the controller if the optimizer was updated."""
        with explained(self.smartfrz, "train_batch"):
            loss = super().train_batch(data_iter)  # type: ignore[misc]
            self.smartfrz.record_loss(loss)
            if self.was_step_applied():  # type: ignore[attr-defined]
                self.smartfrz.after_step()
            else:
                self.smartfrz.step_skipped()
            return loss


class RestoringMixin:
    """The engine with `enabled: false`: nothing is watched or decided, but checkpoints of runs that froze can be loaded."""

    _smartfrz_settings: FreezeConfig

    def load_checkpoint(self, load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
        """Call DeepSpeedEngine.load_checkpoint. A checkpoint with frozen layers turns the engine into a freezing one without a policy.

        Args:
            load_dir: As in FreezingMixin.load_checkpoint.
            tag: As in FreezingMixin.load_checkpoint.
            args: As in FreezingMixin.load_checkpoint.
            kwargs: As in FreezingMixin.load_checkpoint.

        Raises:
            ValueError, RuntimeError: As in FreezingMixin.load_checkpoint.
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
    policy: Any = None,
    **kwargs: Any,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Call deepspeed.initialize with freezing enabled. Collective.

    For a policy that scales learning rates, each layer gets its own parameter group, unless `model_parameters` or an optimizer object is
    given.

    Args:
        args: Arguments of deepspeed.initialize.
        smartfrz: The settings, if they are not in the "smartfrz" section of the DeepSpeed config.
        probe_batch: As in `attach`.
        policy: As in `attach`.
        kwargs: Keyword arguments of deepspeed.initialize, and single settings by name, which take precedence over all others.

    Returns:
        The tuple (engine, optimizer, dataloader, lr_scheduler) of deepspeed.initialize.

    Raises:
        ValueError: Wrong settings, before the engine is built, or a model or engine that freezing does not support.
        RanksDisagree: The ranks differ in package versions, settings or models.
    """
    clear_build_locks()
    named = {name: kwargs.pop(name) for name in tuple(kwargs) if _is_setting(name)}
    source = _config_of(args, kwargs)
    settings = with_settings(smartfrz if smartfrz is not None else source, by_name(policy, named))
    model = kwargs.get("model", args[1] if len(args) > 1 else None)
    model = None if isinstance(model, PipelineModule) else model
    compare_before_start(model, settings, source, deepspeed_version=deepspeed.__version__)
    # By attribute, so that under `python -m smartfrz_ds` the hook makes the engine freeze, and `attach` below finds that done.
    engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **_with_groups(settings, args, kwargs))
    return attach(engine, settings, probe_batch=probe_batch), optimizer, loader, scheduler


def _is_setting(name: str) -> bool:
    """Whether an argument is not DeepSpeed's: then it is a setting, or a misspelt one, of which its check says more."""
    theirs = signature(deepspeed.initialize).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in theirs.values()):  # wrapped by other code, which takes whatever comes
        return name in FreezeConfig.model_fields
    return name not in theirs


def attach(
    engine: EngineT,
    config: ConfigSource = None,
    *,
    probe_batch: Any = None,
    policy: str | Policy | None = None,
    defer_policy: bool = False,
    later: bool = False,
    **settings: Any,
) -> EngineT:
    """Enable freezing for an existing engine. Collective.

    With `enabled: false` the engine is left unchanged, except that it can still load the checkpoint of a run that froze.

    Args:
        engine: A DeepSpeed engine. It is changed in place.
        config: The settings; None: the "smartfrz" section of the engine's own JSON.
        probe_batch: Inputs on which the outputs of the layers are compared (`smartfrz.probe` of them), as the model's forward takes them: a
            tensor, a tuple of positional arguments or a dict of keyword arguments, in the model's dtype. Needed on every rank, with the
            same shapes; the values of rank 0 are used.
        policy: The policy that decides, by name or as an object of your own (`smartfrz_ds.Policy`); it takes precedence over `config`.
        defer_policy: The scheduler and the length of the run follow with `engine.smartfrz.set_schedule(…)`, before the first step.
        later: Deprecated, the former name of `defer_policy`.
        settings: Single settings by name, which take precedence over `config`.

    Returns:
        The same engine.

    Raises:
        ValueError: Wrong settings, or a model or engine that freezing does not support, by name.
        RanksDisagree: The ranks differ in settings, package version or layers.
    """
    if isinstance(engine, FreezingMixin):
        return engine
    if not isinstance(engine, DeepSpeedEngine):
        raise ValueError(f"attach: got a {type(engine).__name__}; allowed: a DeepSpeedEngine or PipelineEngine")
    # engine.config: the dict that DeepSpeed parsed (runtime/engine.py)
    loaded = with_settings(engine.config if config is None else config, by_name(policy, settings))
    if loaded.enabled:
        _turn_on(engine, loaded, probe_batch, defer_policy=defer_policy or later)
    elif not isinstance(engine, RestoringMixin):
        engine._smartfrz_settings = loaded
        engine.__class__ = type(f"Restoring{type(engine).__name__}", (RestoringMixin, type(engine)), {})
    return engine


def _turn_on(engine: Any, settings: FreezeConfig, probe_batch: Any = None, *, defer_policy: bool = False) -> None:
    share_timeout()
    ranks = Collectives(collective_device(engine.module.parameters()))
    ranks.run_on_all_ranks(lambda: check_start(engine))
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
    verdict = judge(
        ranks,
        untested(**versions),  # of torch too: ZeRO's hooks, and the views and storages that a freeze changes, are torch's
        lambda: case_of(engine, settings),
        settings.untested_versions,
        versions=versions,
        library=Path(deepspeed.__file__).parent / "runtime",
    )
    backend = ranks.run_on_all_ranks(lambda: make_backend(engine, zero3_frozen=settings.zero3.frozen))
    backend.warnings += [verdict.text] if verdict.text else []
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
    engine.smartfrz.begin()


def case_of(engine: Any, settings: FreezeConfig) -> Case:
    """Return what a self-check checks for this engine."""
    pipeline = isinstance(engine, PipelineEngine)
    return of_config(config_of(engine), pipeline=pipeline, frozen=settings.zero3.frozen, device=torch.device(engine.device).type)


def _with_groups(settings: FreezeConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of deepspeed.initialize, with a parameter group per layer if the policy needs and may have them."""
    # deepspeed/__init__.py: initialize(args, model, optimizer, model_parameters, ...)
    given = dict(zip(("args", "model", "optimizer", "model_parameters"), args, strict=False)) | kwargs
    own = given.get("model_parameters") is not None or isinstance(given.get("optimizer"), Optimizer)
    wanted = settings.enabled and issubclass(_policy_class(settings), SetsLr) and not settings.dry_run
    model = given.get("model")
    if own or not wanted or len(args) > 3 or not isinstance(model, Module) or isinstance(model, PipelineModule):
        return kwargs
    return kwargs | {"model_parameters": layer_groups(find_layers(model, settings.layers))}


def _policy_class(settings: FreezeConfig) -> type[Any]:
    """Return the class of the policy. Where it is not built in, collective if there is a process group: a rank may fail to import it."""

    def find() -> type[Any]:
        return policy_class(settings.policy, settings.policy_object)

    together = settings.is_own_policy and torch.distributed.is_initialized()
    return Collectives(collective_device()).run_on_all_ranks(find) if together else find()


def _config_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ConfigSource:
    """Return the config among the arguments of deepspeed.initialize.

    Source: deepspeed/__init__.py (config, config_params, args.deepspeed_config).
    """
    for name in ("config", "config_params"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    parsed = kwargs.get("args") or (args[0] if args else None)
    for name in ("deepspeed_config", "deepscale_config"):
        if getattr(parsed, name, None) is not None:
            return getattr(parsed, name)
    return {}
