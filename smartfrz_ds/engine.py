"""initialize and attach: a freezing engine is its DeepSpeed class plus one mixin.

The object's class is swapped (as torch's fully_shard does), so it stays what it was: the same object, isinstance holds, and every
handle that somebody else has stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from ._version import __version__
from .backends import make_backend
from .config import FreezeConfig
from .controller import Controller

EngineT = TypeVar("EngineT", bound=DeepSpeedEngine)
ConfigSource = FreezeConfig | Mapping[str, Any] | str | Path | None


class FreezingMixin:
    """What a freezing engine does beyond its DeepSpeed class. Signatures are DeepSpeed's."""

    smartfrz: Controller

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeedEngine.step, then the controller if that was a successful optimizer update (not a micro-batch, not a skipped one)."""
        result = super().step(*args, **kwargs)  # type: ignore[misc]
        if self.was_step_applied():  # type: ignore[attr-defined]
            self.smartfrz.after_step()
        return result

    def save_checkpoint(self, save_dir: str, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeedEngine.save_checkpoint; remembers where, for error messages."""
        result = super().save_checkpoint(save_dir, *args, **kwargs)  # type: ignore[misc]
        self.smartfrz.last_checkpoint = str(save_dir)
        return result


def initialize(
    *args: Any,
    smartfrz: ConfigSource = None,
    **kwargs: Any,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """As deepspeed.initialize, with freezing on.

    smartfrz: the settings, where they are not in the "smartfrz" section of the DeepSpeed config.
    Returns the tuple (engine, optimizer, dataloader, lr_scheduler) of deepspeed.initialize.

    Raises:
        ValueError: wrong settings, before the engine is built; a model or an engine that freezing does not work with.
    """
    settings = FreezeConfig.load(smartfrz if smartfrz is not None else _config_of(args, kwargs))
    # Through the module, so that a hook of `python -m smartfrz_ds` is seen as a freezing engine made twice, not as two of them.
    engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **kwargs)
    return attach(engine, settings), optimizer, loader, scheduler


def attach(engine: EngineT, config: ConfigSource = None) -> EngineT:
    """Turn freezing on for an engine that exists. Collective; the engine itself is changed and returned.

    config: the settings; None takes the "smartfrz" section of the engine's own JSON.

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
    if not settings.enabled:
        return engine
    backend = make_backend(engine, zero3_frozen=settings.zero3.frozen, allow_untested_versions=settings.allow_untested_versions)
    engine.smartfrz = Controller(
        engine.module, backend, settings, scheduler=engine.lr_scheduler, monitor=engine.monitor, version=__version__
    )
    engine.__class__ = type(f"Freezing{type(engine).__name__}", (FreezingMixin, type(engine)), {})
    return engine


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
