"""Freezes converged layers during a DeepSpeed or FSDP run, bit-exactly, and releases their memory and communication.

    engine, optimizer, loader, scheduler = smartfrz_ds.initialize(model=model, config="ds_config.json")
    engine = smartfrz_ds.attach(engine)   # or: an engine that a framework created
    controller = smartfrz_ds.attach_torch(model, optimizer, settings)   # or: FSDP, DDP or one process, without DeepSpeed

`engine.smartfrz` is the controller. Names are loaded on first use, so that parts work without DeepSpeed or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from smartfrz_ds.cache.host_sampler import HostSampler
    from smartfrz_ds.config.settings import FreezeConfig
    from smartfrz_ds.distributed.failures import explained
    from smartfrz_ds.integrations.accelerate import prepare
    from smartfrz_ds.integrations.deepspeed import attach, initialize
    from smartfrz_ds.integrations.lightning import LightningFreezeCallback
    from smartfrz_ds.integrations.torch import TorchController, attach_torch
    from smartfrz_ds.integrations.transformers import FreezeCallback
    from smartfrz_ds.model.layers import find_layers
    from smartfrz_ds.model.view import View
    from smartfrz_ds.policies.base import Decision, Policy
    from smartfrz_ds.runtime.controller import Controller, Report
    from smartfrz_ds.signals.lr_scale import layer_groups
    from smartfrz_ds.telemetry.events import FreezeEvent, read_events
    from smartfrz_ds.telemetry.report import write_report

    from .errors import ChangeUndone, FreezeError, MissingGradients, NotEnoughMemory, RanksDisagree

_HOMES = {
    "initialize": "integrations.deepspeed",
    "attach": "integrations.deepspeed",
    "FreezeCallback": "integrations.transformers",
    "LightningFreezeCallback": "integrations.lightning",
    "prepare": "integrations.accelerate",
    "attach_torch": "integrations.torch",
    "Controller": "runtime.controller",
    "TorchController": "integrations.torch",
    "Report": "runtime.controller",
    "FreezeConfig": "config.settings",
    "ChangeUndone": "errors",
    "FreezeError": "errors",
    "FreezeEvent": "telemetry.events",
    "MissingGradients": "errors",
    "NotEnoughMemory": "errors",
    "RanksDisagree": "errors",
    "read_events": "telemetry.events",
    "write_report": "telemetry.report",
    "explained": "distributed.failures",
    "HostSampler": "cache.host_sampler",
    "find_layers": "model.layers",
    "Policy": "policies.base",
    "View": "model.view",
    "Decision": "policies.base",
    "layer_groups": "signals.lr_scale",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ChangeUndone",
    "Controller",
    "Decision",
    "FreezeCallback",
    "FreezeConfig",
    "FreezeError",
    "FreezeEvent",
    "HostSampler",
    "LightningFreezeCallback",
    "MissingGradients",
    "NotEnoughMemory",
    "Policy",
    "RanksDisagree",
    "Report",
    "TorchController",
    "View",
    "__version__",
    "attach",
    "attach_torch",
    "explained",
    "find_layers",
    "initialize",
    "layer_groups",
    "prepare",
    "read_events",
    "write_report",
]
