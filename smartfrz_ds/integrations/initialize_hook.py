"""Makes deepspeed.initialize return freezing engines, for as long as somebody asks for it: never at import.

For `python -m smartfrz_ds` (as long as the script runs) and for a Trainer's FreezeCallback (while the Trainer prepares).
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

# The engine of a model, by id(engine.module): Trainer and Accelerate tell a callback the model only.
_ENGINES: WeakValueDictionary[int, Any] = WeakValueDictionary()


def install_hook(settings_of: Callable[[Any], FreezeConfig] = FreezeConfig.load, *, probe_batch: Any = None, later: bool = False) -> None:
    """From now on deepspeed.initialize returns freezing engines.

    settings_of: makes the settings from what deepspeed.initialize gets as its config. probe_batch, later: as of `attach`.
    An engine without an optimizer (ZeRO-3 inference) stays what it is. A new hook takes the place of an old one until it is removed.
    """
    clear_build_locks()  # here too: a script may need DeepSpeed's ops before it makes its engine
    found = deepspeed.initialize
    plain = getattr(found, "without_freezing", found)

    @functools.wraps(plain)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        try:
            settings = settings_of(_config_of(args, kwargs))  # what is wrong with them is said before the engine is built
            engine, *others = plain(*args, **kwargs)
            if engine.basic_optimizer is not None:
                attach(engine, settings, probe_batch=probe_batch, later=later)
                _ENGINES[id(engine.module)] = engine
            return (engine, *others)
        finally:
            if later and deepspeed.initialize is initialize:  # one engine is prepared; if that fails, nobody comes back to remove this
                remove_hook()

    initialize.without_freezing = plain  # type: ignore[attr-defined]
    initialize.before = found if later else initialize  # type: ignore[attr-defined]
    deepspeed.initialize = initialize


def remove_hook() -> None:
    """Take away a hook that was installed with `later`, while something prepared."""
    deepspeed.initialize = getattr(deepspeed.initialize, "before", deepspeed.initialize)


def engine_of(model: Any) -> Any:
    """The living engine that a hook made of this model, or None."""
    engine = _ENGINES.get(id(model))
    return engine if engine is not None and engine.module is model else None
