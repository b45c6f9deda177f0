"""`smartfrz doctor`, second part: problems of a DeepSpeed JSON, and the layers of a model that can freeze."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smartfrz_ds.config.reading import read_config, total_steps_in
from smartfrz_ds.config.refusals import refused_by
from smartfrz_ds.config.refusals import section as _sub
from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.model.flops import FlopMeter, FlopProfile, estimate_profile, saved_fraction
from smartfrz_ds.model.freeze_modules import check_tied
from smartfrz_ds.model.keep_active import KeptActive, keep_active, names_inside
from smartfrz_ds.model.layers import Layer, find_layers
from smartfrz_ds.runtime.rules.before_start import problems_of_files, problems_of_length
from smartfrz_ds.runtime.rules.eligibility import Order, allowed, candidates

from .doctor_load import TOKENS
from .doctor_refusals import wrong_values
from .findings import Finding


def check_config(file: Path) -> tuple[list[Finding], FreezeConfig | None]:
    """Check a DeepSpeed JSON.

    Returns:
        The findings, and the settings; None where they cannot be read.
    """
    try:
        settings = FreezeConfig.load(file)
        raw = dict(read_config(file)[0])
    except ValueError as error:
        answer = "docs/configuration.md lists every key; smartfrz check-config FILE prints the settings that a run would use"
        return [Finding("config", "problem", line, answer) for line in str(error).splitlines()], None
    if not settings.enabled:
        return [Finding("config", "warning", f"{SECTION}.enabled is false: nothing will freeze", "set it to true")], settings
    found = [Finding("config", "problem", *pair) for pair in [*wrong_values(raw), *refused_by(raw)]]
    found += [Finding("config", "problem", one.text, one.remedy) for one in problems_of_files(settings)]
    found += [Finding("config", "warning", *pair) for pair in traps(raw, settings)]
    return found or [Finding("config", "ok", f"{file}: policy {settings.policy!r}")], settings


def traps(raw: Mapping[str, Any], settings: FreezeConfig, *, gpus: int | None = None) -> list[tuple[str, str]]:
    """Find settings that work but have unexpected effects.

    Args:
        raw: The whole DeepSpeed config.
        settings: Its "smartfrz" section.
        gpus: Number of GPUs; default: of this machine.

    Returns:
        Pairs of text and remedy.
    """
    zero, optimizer = _sub(raw, "zero_optimization"), _sub(raw, "optimizer")
    gpus = torch.accelerator.device_count() if gpus is None else gpus
    cpu = gpus == 0 or os.environ.get("DS_ACCELERATOR") == "cpu"
    found: list[tuple[str, str]] = []
    if SECTION not in raw:
        found.append((f'there is no "{SECTION}" section: all settings have their defaults', f'add one, at least "{SECTION}": {{}}'))
    if "gradient_clipping" not in raw:
        text = "gradient_clipping is not set: DeepSpeed 0.19.8 then clips at 1.0, by the norm of the active layers, which a freeze changes"
        found.append((text, "set it explicitly: a number, or 0.0 for no clipping"))
    params = optimizer.get("params") if isinstance(optimizer.get("params"), Mapping) else {}
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw") and cpu and not params.get("torch_adam"):  # type: ignore[union-attr]
        text = "optimizer.params.torch_adam is not true: on the CPU DeepSpeed compiles its own Adam, which rounds differently"
        found.append((text, '"torch_adam": true'))
    bucket, stage = zero.get("reduce_bucket_size", 5e8), zero.get("stage", 0)
    if cpu and stage in (1, 2) and isinstance(bucket, int | float) and bucket >= 1e8:
        text = (
            f"zero_optimization.reduce_bucket_size is {bucket:.0e} weights: each rank may allocate {4 * bucket / 1e9:.1f} GB for it (fp32)"
        )
        found.append((text, "set it to a few million on a machine without GPUs"))
    if settings.policy == "attention" and not _sub(raw, "scheduler"):
        text = (
            "there is no scheduler in the JSON: with a constant learning rate the weights keep moving, and the predictor may never freeze"
        )
        found.append((text, "use a decaying learning-rate schedule, here or in the script"))
    found += [(one.text, one.remedy) for one in problems_of_length(settings, total_steps_in(raw, settings.total_steps))]
    if settings.log_path is None:
        text = f"{SECTION}.log_path is null: no log is written, and smartfrz report has no input"
        found.append((text, '"log_path": "runs/NAME/freezing.jsonl"'))
    return found


# --- the model -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One row of the model's table.

    Attributes:
        position: Index of the layer, front to back.
        name: Name of the layer.
        kind: "embedding", "block" or "head".
        weights: Number of trainable weights.
        forward: Share of the forward's FLOPs, in [0, 1].
        saved: Share of a training step's FLOPs that freezing this layer and all before it saves, in [0, 1].
        freezable: Whether it can freeze.
        reason: Why it cannot freeze, or what happens to shared weights.
    """

    position: int
    name: str
    kind: str
    weights: int
    forward: float
    saved: float
    freezable: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable dict."""
        return asdict(self)


def check_model(model: nn.Module, batch: Any = None, settings: FreezeConfig | None = None) -> tuple[list[Finding], list[LayerFacts]]:
    """Examine the layers of a model, their order, and which of them can freeze.

    Args:
        model: The model.
        batch: Input of its forward, with which FLOPs are counted: a tensor, a tuple or a dict. None: FLOPs are estimated, also where the
            forward fails.
        settings: Default: the defaults.

    Returns:
        The findings, and the layers front to back.
    """
    settings = settings or FreezeConfig()
    try:
        layers = find_layers(model, settings.layers)
    except ValueError as error:
        answer = "list the layers explicitly, front to back, in smartfrz.layers (docs/configuration.md)"
        if "ScriptModule" in str(error):
            answer = "call the function before torch.jit.script; torch.compile works with freezing"
        return [Finding("model", "problem", str(error), answer)], []
    try:
        kept = keep_active(settings.keep_active, layers, names_inside(model, layers), "smartfrz.keep_active")
    except ValueError as error:
        return [Finding("model", "problem", str(error), f"the layers are: {', '.join(layer.name for layer in layers)}")], []
    found = [Finding("model", "ok", line)] if (line := kept.describe("smartfrz.keep_active")) else []
    try:
        check_tied(layers, settings.tied)
    except ValueError as error:
        found.append(Finding("model", "problem", str(error), 'set smartfrz.tied to "freeze" if your model may freeze both uses'))
    profile, measured = _profile(model, layers, batch, settings)
    facts = _facts(layers, profile, settings, kept)
    able = [fact for fact in facts if fact.freezable]
    if not able:
        text = f"none of the {len(layers)} layers can freeze"
        found.append(
            Finding("model", "problem", text, "the table has the reason for each; check smartfrz.keep_active and max_frozen_fraction")
        )
    else:
        how = "counted in a forward" if measured else f"estimated from the weights, {TOKENS} tokens (too low for convolutions)"
        most = max(fact.saved for fact in able)
        text = f"{len(layers)} layers, {len(able)} can freeze; freezing all of these saves {100 * most:.0f} % of a step's FLOPs ({how})"
        found.append(Finding("model", "ok", text))
    hidden = next((fact for fact in facts if fact.weights and not fact.freezable and fact.kind != "head"), None)
    if hidden and able and settings.order == "front_to_back" and hidden.position < max(fact.position for fact in able):
        text = f"{hidden.name!r} stays active, so no layer after it ever freezes (order is front_to_back)"
        found.append(
            Finding(
                "model",
                "warning",
                text,
                'set smartfrz.order to "any" (saves memory and traffic, but little time), or allow this layer to freeze',
            )
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
            reason = "nothing to freeze: " + ("its weights were frozen by the user" if _has_weights(layer) else "no weights of its own")
        elif layer.name in kept.names:
            reason = "smartfrz.keep_active" + (f": {why}" if (why := kept.reason(layer.name)) else "")
        elif layer.name not in fits and (blocked := _blocked(layer, layers, able, settings.order)):
            reason = f"the {'earlier' if settings.order == 'front_to_back' else 'later'} layer {blocked} stays active"
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
                reason="its shared weight continues to train in the later layer" if shares else reason,
            )
        )
    return facts


def _has_weights(layer: Layer) -> bool:
    return any(next(module.parameters(), None) is not None for module in layer.modules) and not layer.borrowed


def _blocked(layer: Layer, layers: Sequence[Layer], able: set[str], order: Order) -> str:
    """Return the active layer that keeps this one active, by `order`; "" if there is none."""
    if order == "any":
        return ""
    first = layers[: layer.position] if order == "front_to_back" else layers[layer.position + 1 :]
    return next((x.name for x in first if x.numel and x.kind != "head" and x.name not in able), "")


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
        except Exception:  # the model cannot run without weights, or needs other inputs: the estimate replaces the count
            meter.profile = None
        meter.remove()
        if meter.profile is not None and any(meter.profile.forward):
            return meter.profile, True
    return estimate_profile(layers, TOKENS), False
