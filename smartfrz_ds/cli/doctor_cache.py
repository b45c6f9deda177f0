"""`smartfrz doctor`: whether the prefix cache can be used with a model, as the start of a run would find it, and its space."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from smartfrz_ds.cache.around import structure_refusal
from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.integrations.torch import attach_torch
from smartfrz_ds.model.freeze_modules import freeze_modules, leaving_params, remember_modules
from smartfrz_ds.model.layers import find_layers

from .doctor_config import LayerFacts
from .findings import Finding

_CHECK = "prefix cache"
_REMEDY = f'remove the cause (docs/prefix-cache.md), or set {SECTION}.cache.mode to "off"'


def check_cache(model: nn.Module, batch: Any, settings: FreezeConfig, facts: Sequence[LayerFacts]) -> list[Finding]:
    """Freeze all layers that can freeze in front, as a run does, and run the model once if there is an input with data.

    Args:
        model: The model. Its layers are as before afterwards.
        batch: Input of its forward: a tensor, a tuple or a dict; None where there is none.
        settings: The settings; `cache.mode` "off" has no finding.
        facts: The model's layers, front to back.
    """
    if settings.cache.mode == "off":
        return []
    depth = next((fact.position for fact in facts if not fact.freezable and fact.weights), 0)
    front = [fact.name for fact in facts[:depth] if fact.freezable]
    if not front:
        return [_refused(settings, "no layer in front can freeze")]
    if (refusal := _of_pipeline(model)) is not None:
        return [_refused(settings, refusal)]
    has_data = not any(p.is_meta for p in model.parameters())
    try:
        reason, row = _tried(model, batch, settings, front) if has_data and batch is not None else (_structure(model, settings, front), 0)
        row = row or _border_bytes(model, batch, facts[depth].name)
    except Exception as error:  # of the user's model, which needs another input, for example
        return [
            Finding(_CHECK, "warning", f"it could not be tried: {type(error).__name__}: {error}", "give the model an input that it takes")
        ]
    border = f"{front[0]} to {front[-1]} frozen"
    if reason:
        return [_refused(settings, f"with {border}, it is off: {reason}")]
    tried = (
        "proven in the first forwards of a run" if has_data and batch is not None else "random numbers and the rest show in a forward only"
    )
    text = f"nothing forbids it with {border} ({tried})"
    if row:
        cache = settings.cache
        disk = cache.disk_bytes if cache.path is not None else 0
        room = (cache.memory_bytes + disk) // row
        where = f"{SECTION}.cache.memory {cache.memory!r}" + (f" and disk {cache.disk!r}" if disk else "")
        text += f"; a sample of this input's shape takes {row:,} bytes, so {where} of a host hold {room:,} samples"
    return [Finding(_CHECK, "ok", text)]


def _refused(settings: FreezeConfig, reason: str) -> Finding:
    return Finding(_CHECK, "problem" if settings.cache.mode == "on" else "warning", reason, _REMEDY)


def _of_pipeline(model: nn.Module) -> str | None:
    try:
        from deepspeed.pipe import PipelineModule

        from smartfrz_ds.backends.pipeline.stage import PipelineStage
    except ImportError:
        return None
    return PipelineStage.forward_ways.refusal if isinstance(model, PipelineModule) else None


def _tried(model: nn.Module, batch: Any, settings: FreezeConfig, front: Sequence[str]) -> tuple[str, int]:
    """Attach to the model, freeze, and run it; return why the cache is off, and the bytes of a row, 0 if it is."""
    kept = {key: getattr(settings, key) for key in ("layers", "order", "frozen_mode", "tied", "keep_active", "max_frozen_fraction")}
    cache = {"mode": "auto", "memory": 1 << 24}  # for one batch
    training = model.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with _silent():
        own = {"policy": "manual", "log_path": None, "status_interval": None, "cache": cache}
        controller = attach_torch(model, optimizer, FreezeConfig.model_validate(own | kept))
        try:
            model.train()
            controller.freeze(list(front))
            _call(model, batch)
            report = controller.report()
        finally:
            controller.detach()
            model.train(training)
    return report.cache_reason, report.cache_row_bytes


def _structure(model: nn.Module, settings: FreezeConfig, front: Sequence[str]) -> str:
    """Return why a run would not use the cache, as far as that shows without a forward."""
    layers = find_layers(model, settings.layers)
    frozen = [layer for layer in layers if layer.name in front]
    tops = [module for layer in layers[: frozen[-1].position + 1] for module in layer.modules]
    restore, params = remember_modules(tops), [p for p in leaving_params(frozen, layers, settings.tied) if p.requires_grad]
    training = model.training
    model.train()
    try:
        for layer in frozen:
            freeze_modules(layer, settings.frozen_mode, settings.tied)
        for p in params:
            p.requires_grad_(False)
        return structure_refusal(model, tops)
    finally:
        for p in params:
            p.requires_grad_(True)
        restore()
        model.train(training)


def _border_bytes(model: nn.Module, batch: Any, first_active: str) -> int:
    """Return the bytes of a row of what the first active layer is given, from shapes alone; 0 where unknown."""
    module = dict(model.named_modules()).get(first_active)
    if module is None or batch is None:
        return 0
    seen: list[int] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim and x.is_floating_point()]
        rows = max((x.shape[0] for x in leaves), default=0)
        seen.append(sum(x.shape[1:].numel() * x.dtype.itemsize for x in leaves if x.shape[0] == rows))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        _call(model, batch)
    finally:
        handle.remove()
    return seen[0] if seen else 0


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the lines of a run out of the doctor's output."""
    logger = logging.getLogger("smartfrz_ds")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
