"""Freeze converged layers while a DeepSpeed run goes on: exactly, with memory and traffic really released.

    engine, optimizer, loader, scheduler = smartfrz_ds.initialize(model=model, config="ds_config.json")
    engine = smartfrz_ds.attach(engine)   # or: on an engine that somebody else made
    controller = smartfrz_ds.attach_torch(model, optimizer, settings)   # or: FSDP, DDP or one process, without DeepSpeed

`engine.smartfrz` is the controller. Names are loaded when they are first used: the predictor runs without DeepSpeed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .accelerated import prepare
    from .agree import RanksDisagree
    from .backends.base import FreezeError
    from .config import FreezeConfig
    from .controller import Controller, Report
    from .engine import attach, initialize
    from .events import FreezeEvent, read_events
    from .hf import FreezeCallback
    from .torch_loop import TorchController, attach_torch

_HOMES = {
    "initialize": "engine",
    "attach": "engine",
    "FreezeCallback": "hf",
    "prepare": "accelerated",
    "attach_torch": "torch_loop",
    "Controller": "controller",
    "TorchController": "torch_loop",
    "Report": "controller",
    "FreezeConfig": "config",
    "FreezeError": "backends.base",
    "FreezeEvent": "events",
    "RanksDisagree": "agree",
    "read_events": "events",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Controller",
    "FreezeCallback",
    "FreezeConfig",
    "FreezeError",
    "FreezeEvent",
    "RanksDisagree",
    "Report",
    "TorchController",
    "__version__",
    "attach",
    "attach_torch",
    "initialize",
    "prepare",
    "read_events",
]
