"""`smartfrz doctor`, second part: what is wrong with a DeepSpeed JSON, and what of a model can freeze."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smartfrz_ds.config.reading import read_config
from smartfrz_ds.config.refusals import refused_by
from smartfrz_ds.config.refusals import section as _sub
from smartfrz_ds.config.settings import SECTION, FreezeConfig, is_default
from smartfrz_ds.model.flops import FlopMeter, FlopProfile, estimate_profile, saved_fraction
from smartfrz_ds.model.freeze_modules import check_tied
from smartfrz_ds.model.keep_active import KeptActive, keep_active, names_inside
from smartfrz_ds.model.layers import Layer, find_layers
from smartfrz_ds.runtime.eligibility import allowed, candidates
from smartfrz_ds.runtime.intervals import resolve, why_never
from smartfrz_ds.signals.lr_forecast import total_steps_in

from .doctor_refusals import wrong_values
from .findings import Finding

_TOKENS = 128
_NEEDS_LENGTH = ("linear", "late", "random", "freezeout", "pipetransformer", "weight_drift")


def check_config(file: Path) -> tuple[list[Finding], FreezeConfig | None]:
    """Findings on a DeepSpeed JSON, and its settings where they can be read."""
    try:
        settings = FreezeConfig.load(file)
        raw = dict(read_config(file)[0])
    except ValueError as error:
        answer = "docs/configuration.md lists every key; smartfrz check-config FILE shows what a run would use"
        return [Finding("config", "problem", line, answer) for line in str(error).splitlines()], None
    if not settings.enabled:
        return [Finding("config", "warning", f"{SECTION}.enabled is false: nothing will freeze", "set it to true")], settings
    found = [Finding("config", "problem", *pair) for pair in [*wrong_values(raw), *refused_by(raw)]]
    found += [Finding("config", "warning", *pair) for pair in traps(raw, settings)]
    return found or [Finding("config", "ok", f"{file}: policy {settings.policy!r}")], settings


def traps(raw: Mapping[str, Any], settings: FreezeConfig, *, gpus: int | None = None) -> list[tuple[str, str]]:
    """What works, but not as one would think; with answers. gpus: default: those of this machine."""
    zero, optimizer = _sub(raw, "zero_optimization"), _sub(raw, "optimizer")
    gpus = torch.cuda.device_count() if gpus is None else gpus
    cpu = gpus == 0 or os.environ.get("DS_ACCELERATOR") == "cpu"
    found: list[tuple[str, str]] = []
    if SECTION not in raw:
        found.append((f'there is no "{SECTION}" section: a run takes all defaults', f'add one, if only "{SECTION}": {{}}'))
    if "gradient_clipping" not in raw:
        text = "gradient_clipping is not set: DeepSpeed 0.19.8 clips at 1.0 then, by the norm of the active layers, which a freeze changes"
        found.append((text, "write what you mean: a number, or 0.0 for no clipping"))
    params = optimizer.get("params") if isinstance(optimizer.get("params"), Mapping) else {}
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw") and cpu and not params.get("torch_adam"):  # type: ignore[union-attr]
        text = (
            "optimizer.params.torch_adam is not true: on the CPU DeepSpeed compiles its own Adam at the first start; its last bits differ"
        )
        found.append((text, '"torch_adam": true'))
    bucket, stage = zero.get("reduce_bucket_size", 5e8), zero.get("stage", 0)
    if cpu and stage in (1, 2) and isinstance(bucket, int | float) and bucket >= 1e8:
        text = f"zero_optimization.reduce_bucket_size is {bucket:.0e} weights: each rank may take {4 * bucket / 1e9:.1f} GB for it (fp32)"
        found.append((text, "make it a few million on a machine without GPUs"))
    found += _length(settings, raw)
    if settings.log_path is None:
        text = f"{SECTION}.log_path is null: there will be no log, and nothing for smartfrz report"
        found.append((text, '"log_path": "runs/NAME/freezing.jsonl"'))
    return found


def _length(settings: FreezeConfig, raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    if settings.policy == "manual":
        return []
    total = total_steps_in(raw, settings.total_steps)
    found = []
    if not _sub(raw, "scheduler") and settings.policy == "attention":
        text = "there is no scheduler in the JSON: with a constant learning rate weights never settle, and the predictor may never freeze"
        found.append((text, "give the run a schedule that decays, here or in the script"))
    answer = "scheduler.params.total_num_steps, or smartfrz.total_steps; a scheduler or Trainer of the script's says it too"
    try:
        now = resolve(settings, total)
    except ValueError as error:
        return [*found, *((line, answer) for line in str(error).splitlines())]
    if total is None and (settings.policy in _NEEDS_LENGTH or (settings.policy == "attention" and settings.attention.mode == "budget")):
        text = f"the JSON does not say how long the run is, and the policy {settings.policy!r} plans by it"
        found.append((text, answer))
    if why := why_never(settings, total):
        text, _, what = why.partition(". Set ")
        found.append((text, f"set {what}"))
    spaced = not is_default(settings, "snapshot_interval") or not is_default(settings, "window")
    span = (settings.window - 1) * now.snapshot_interval
    if total and not why and spaced and settings.policy == "attention" and span > total / 2:
        text = f"a window of snapshots spans {span} steps, more than half of the run's {total}"
        found.append((text, "a smaller snapshot_interval, or a smaller window"))
    return found


# --- the model -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One row of the table. weights: that train. forward: share of the forward's FLOPs. saved: share of a training step's FLOPs that is
    saved while this layer and all in front of it are frozen. reason: why it can't freeze, or what becomes of shared weights."""

    position: int
    name: str
    kind: str
    weights: int
    forward: float
    saved: float
    freezable: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_model(name: str) -> tuple[nn.Module, Any]:
    """A model, and a batch for it where there is one.

    name: MODULE:CALLABLE (called without arguments; returns a module, or a module and what its forward takes), or a Hugging Face model's
        name or folder: built without weights, on the meta device.
    Raises ValueError where that can't be.
    """
    module, colon, function = name.rpartition(":")
    try:
        if colon and not Path(name).exists():
            sys.path.insert(0, os.getcwd())
            made = getattr(importlib.import_module(module), function)()
            model, batch = made if isinstance(made, tuple) else (made, None)
            if not isinstance(model, nn.Module):
                raise ValueError(f"it returned {type(model).__name__}, no torch module")
            return model, batch
        import transformers

        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config) if kind in (None, transformers.AutoModel) else kind(config)
        return model, {"input_ids": torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")}
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise
        raise ValueError(f"--model {name}: {error}") from error
    except Exception as error:
        raise ValueError(f"--model {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def check_model(model: nn.Module, batch: Any = None, settings: FreezeConfig | None = None) -> tuple[list[Finding], list[LayerFacts]]:
    """Which layers a model has, in which order, and what of them can freeze; front to back.

    batch: what its forward takes, to count FLOPs with (a tensor, a tuple or a dict); None, or where that forward fails: estimated.
    """
    settings = settings or FreezeConfig()
    try:
        layers = find_layers(model, settings.layers)
    except ValueError as error:
        answer = "list the layers by hand, front to back: smartfrz.layers (docs/configuration.md)"
        return [Finding("model", "problem", str(error), answer)], []
    try:
        kept = keep_active(settings.keep_active, layers, names_inside(model, layers), "smartfrz.keep_active")
    except ValueError as error:
        return [Finding("model", "problem", str(error), f"layers are: {', '.join(layer.name for layer in layers)}")], []
    found = [Finding("model", "ok", line)] if (line := kept.told("smartfrz.keep_active")) else []
    try:
        check_tied(layers, settings.tied)
    except ValueError as error:
        found.append(Finding("model", "problem", str(error), 'smartfrz.tied: "freeze", if freezing both uses is right for your model'))
    profile, measured = _profile(model, layers, batch, settings)
    facts = _facts(layers, profile, settings, kept)
    able = [fact for fact in facts if fact.freezable]
    if not able:
        text = f"none of the {len(layers)} layers can freeze"
        found.append(Finding("model", "problem", text, "the table says why for each; look at smartfrz.keep_active and max_frozen_fraction"))
    else:
        how = "counted in a forward" if measured else f"estimated from the weights, {_TOKENS} tokens (too low for convolutions)"
        most = max(fact.saved for fact in able)
        text = f"{len(layers)} layers, {len(able)} can freeze; with all of them frozen a step needs {100 * most:.0f} % fewer FLOPs ({how})"
        found.append(Finding("model", "ok", text))
    hidden = next((fact for fact in facts if fact.weights and not fact.freezable and fact.kind != "head"), None)
    if hidden and able and settings.order == "front_to_back" and hidden.position < max(fact.position for fact in able):
        text = f"{hidden.name!r} stays active, so nothing behind it ever freezes (order is front_to_back)"
        found.append(
            Finding("model", "warning", text, 'smartfrz.order: "any" (it saves memory and traffic, but little time), or let it freeze')
        )
    return found, facts


def _facts(layers: Sequence[Layer], profile: FlopProfile, settings: FreezeConfig, kept: KeptActive) -> list[LayerFacts]:
    able = set(candidates(layers, (), kept.names))
    fits = allowed(layers, (), able, order=settings.order, max_frozen_fraction=settings.max_frozen_fraction)
    whole = sum(profile.forward) or 1.0
    facts = []
    for layer in layers:
        if layer.kind == "head":
            reason = "the head always trains"
        elif not layer.numel:
            reason = "nothing to freeze: " + ("you froze its weights" if _has_weights(layer) else "no weights of its own")
        elif layer.name in kept.names:
            reason = "smartfrz.keep_active" + (f": {why}" if (why := kept.reason(layer.name)) else "")
        elif layer.name not in fits and settings.order == "front_to_back" and _blocked(layer, layers, able):
            reason = f"{_blocked(layer, layers, able)} in front of it stays active"
        elif layer.name not in fits:
            reason = f"max_frozen_fraction {settings.max_frozen_fraction}"
        else:
            reason = ""
        shares = bool(layer.tied) and settings.tied == "train" and not reason
        facts.append(
            LayerFacts(
                position=layer.position,
                name=layer.name,
                kind=layer.kind,
                weights=layer.numel,
                forward=profile.forward[layer.position] / whole,
                saved=saved_fraction(profile, range(layer.position + 1)),
                freezable=not reason,
                reason="its shared weight goes on training in the layer behind" if shares else reason,
            )
        )
    return facts


def _has_weights(layer: Layer) -> bool:
    return any(next(module.parameters(), None) is not None for module in layer.modules) and not layer.borrowed


def _blocked(layer: Layer, layers: Sequence[Layer], able: set[str]) -> str:
    return next((x.name for x in layers[: layer.position] if x.numel and x.name not in able), "")


def _profile(model: nn.Module, layers: Sequence[Layer], batch: Any, settings: FreezeConfig) -> tuple[FlopProfile, bool]:
    if batch is not None:
        meter = FlopMeter(model, layers, settings.tied)
        call: Callable[[], Any] = (
            (lambda: model(**batch))
            if isinstance(batch, Mapping)
            else (lambda: model(*batch))
            if isinstance(batch, tuple)
            else lambda: model(batch)
        )
        try:
            call()
        except Exception:  # a model that can't do it without weights, or wants other inputs: the estimate says so
            meter.profile = None
        meter.remove()
        if meter.profile is not None and any(meter.profile.forward):
            return meter.profile, True
    return estimate_profile(layers, _TOKENS), False
