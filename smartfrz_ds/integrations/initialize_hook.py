"""Makes deepspeed.initialize return freezing engines, on request only: never at import.

Used by `python -m smartfrz_ds`, while the script runs, and by FreezeCallback and `prepare`, while a Trainer or Accelerate prepares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import deepspeed

from smartfrz_ds.config.settings import FreezeConfig

from .build_locks import clear as clear_build_locks
from .deepspeed import _config_of, attach

# The engine of each model, by id(engine.module): Trainer and Accelerate pass only the model to a callback.
_ENGINES: WeakValueDictionary[int, Any] = WeakValueDictionary()


def install_hook(
    settings_of: Callable[[Any], FreezeConfig] = FreezeConfig.load, *, probe_batch: Any = None, defer_policy: bool = False
) -> None:
    """Make deepspeed.initialize return freezing engines from now on.

    An engine without an optimizer (ZeRO-3 inference) is left unchanged. A new hook replaces the previous one until it is removed.

    Args:
        settings_of: Returns the settings for the config that deepspeed.initialize receives.
        probe_batch: As in `attach`.
        defer_policy: As in `attach`. The hook then covers one engine and is removed by `remove_hook`.
    """
    clear_build_locks()  # not only in attach: a script may need DeepSpeed's ops before it creates its engine
    found = deepspeed.initialize
    plain = getattr(found, "without_freezing", found)

    @functools.wraps(plain)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        try:
            settings = settings_of(_config_of(args, kwargs))  # wrong settings are refused before the engine is built
            engine, *others = plain(*args, **kwargs)
            if engine.basic_optimizer is not None:
                attach(engine, settings, probe_batch=probe_batch, defer_policy=defer_policy)
                _ENGINES[id(engine.module)] = engine
            return (engine, *others)
        finally:
            if defer_policy and deepspeed.initialize is initialize:  # also where preparing failed: the caller may never remove the hook
                remove_hook()

    initialize.without_freezing = plain  # type: ignore[attr-defined]
    initialize.before = found if defer_policy else initialize  # type: ignore[attr-defined]
    deepspeed.initialize = initialize


def remove_hook() -> None:
    """Remove a hook that was installed with `defer_policy`."""
    deepspeed.initialize = getattr(deepspeed.initialize, "before", deepspeed.initialize)


def engine_of(model: Any) -> Any:
    """Return the existing engine that the hook created for this model, or None."""
    engine = _ENGINES.get(id(model))
    return engine if engine is not None and engine.module is model else None
