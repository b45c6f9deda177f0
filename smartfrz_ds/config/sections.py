"""Sub-sections of the settings (one for each policy, for each kind of engine and for the guard), and how a key is declared."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .shares import percent_of


def setting(default: Any, allowed: str, meaning: str, **limits: Any) -> Any:
    """Declare a setting as a pydantic field.

    Args:
        default: The default value.
        allowed: The allowed values in words, for error messages and the documentation.
        meaning: What the setting does, for the documentation.
        **limits: Constraints of `pydantic.Field` that enforce `allowed`.
    """
    return Field(default=default, description=meaning, json_schema_extra={"allowed": allowed}, **limits)


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_list_to_tuple)]


def _is_share(value: str) -> str:
    if percent_of(value) is None:
        raise PydanticCustomError("share", "not a share of the run")
    return value


def _is_positive_share(value: str) -> str:
    if not percent_of(value):
        raise PydanticCustomError("share", "not a positive share of the run")
    return value


# A number of steps: an integer, or a share of the run that is converted once the length of the run is known.
Steps = Annotated[int, Field(ge=0)] | Annotated[str, AfterValidator(_is_share)]
Interval = Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(_is_positive_share)]
OR_SHARE = "or a share of the run such as '10%'"
PolicyName = Literal[
    "attention",
    "linear",
    "late",
    "band",
    "random",
    "freezeout",
    "autofreeze",
    "egeria",
    "pipetransformer",
    "weight_drift",
    "schedule",
    "manual",
]


def _check_end(start: int | str | None, end: int | str | None) -> None:
    """Refuse an end that is not after the start. A number and a share are only comparable once the run's length is known."""
    start = 0 if start is None and not isinstance(end, str) else start
    if isinstance(start, int) and isinstance(end, int) and end <= start:
        raise ValueError(f"end_step: got {end}; allowed: an integer > start_step ({start}), {OR_SHARE}, or null")
    first, last = percent_of(start), percent_of(end)
    if last is not None and last <= (first or 0.0) and not isinstance(start, int):
        raise ValueError(f"end_step: got '{end}'; allowed: a share > start_step ({start}), an integer, or null")


class Section(BaseModel):
    """Base class of the settings: strict types, no unknown keys, immutable."""

    # strict: the text "50" and the value true are not integers. Non-finite numbers are refused everywhere.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class AttentionSettings(Section):
    """`smartfrz.attention`: the attention predictor of SmartFRZ."""

    predictor: str | None = setting(
        None,
        "a path to a .safetensors file, or null",
        "Weights from `smartfrz train-predictor`; null: the shipped ones.",
        min_length=1,
    )
    threshold: float | None = setting(
        None,
        "a number in (0, 1), or null",
        "A layer counts as converged at or above this probability; null: the threshold stored in the predictor file.",
        gt=0,
        lt=1,
    )
    patience: int = setting(2, "an integer >= 1", "Consecutive freezing stages that must agree before a layer freezes.", ge=1)
    mode: Literal["auto", "budget"] = setting(
        "auto",
        "'auto' or 'budget'",
        "auto: a layer freezes once it has converged, so the saving depends on the run; budget: the saving is given, and the predictor and "
        "the remaining learning rates decide which layers freeze and when. `threshold` and `patience` apply to auto only.",
    )
    budget: float = setting(
        0.3,
        "a number in (0, 0.6]",
        "Mode budget: share of the whole run's training FLOPs (forward and backward) to save at most.",
        gt=0,
        le=0.6,
    )


class LinearSettings(Section):
    """`smartfrz.linear`: freeze the front layers one by one, evenly spaced between two steps."""

    start_step: Steps | None = setting(
        None, f"an integer >= 0, {OR_SHARE}, or null", "The step at which freezing begins; null: 20 % of the run."
    )
    end_step: Steps | None = setting(
        None,
        f"an integer > start_step, {OR_SHARE}, or null",
        "The step by which `max_frozen_fraction` of the layers are frozen; null: 80 % of the run.",
    )

    @model_validator(mode="after")
    def _end_after_start(self) -> LinearSettings:
        _check_end(self.start_step, self.end_step)
        return self


class LateSettings(Section):
    """`smartfrz.late`: freeze the whole body at one step."""

    start_step: Steps | None = setting(
        None,
        f"an integer >= 0, {OR_SHARE}, or null",
        "The step at which every layer that may freeze does so; null: after `share` of the run.",
    )
    share: float = setting(
        0.7, "a number in [0, 1)", "Share of the run's steps before the freeze, used if `start_step` is null.", ge=0, lt=1
    )


class BandSettings(Section):
    """`smartfrz.band`: freeze the front and the back of the network at one step, and train the middle. Needs `order` "any"."""

    width: float = setting(0.4, "a number in (0, 1)", "Share of the body's layers that keeps training.", gt=0, lt=1)
    center: float = setting(0.5, "a number in [0, 1]", "Position of the middle of these layers; 0: front, 1: back.", ge=0, le=1)
    start_step: Steps | None = setting(
        None, f"an integer >= 0, {OR_SHARE}, or null", "The step at which the rest freezes; null: after `share` of the run."
    )
    share: float = setting(
        0.1, "a number in [0, 1)", "Share of the run's steps before the freeze, used if `start_step` is null.", ge=0, lt=1
    )


class RandomSettings(Section):
    """`smartfrz.random`: freeze layers at random steps; the first ones in `order`, or any of them with `any`."""

    ratio: float | None = setting(
        None,
        "a number in (0, 1], or null",
        "Share of the layers that are frozen at the end; null: `max_frozen_fraction`, which is also the upper limit.",
        gt=0,
        le=1,
    )
    start_step: Steps | None = setting(
        None, f"an integer >= 0, {OR_SHARE}, or null", "The first step that can be drawn; null: 20 % of the run."
    )
    end_step: Steps | None = setting(
        None, f"an integer > start_step, {OR_SHARE}, or null", "The last step that can be drawn; null: 80 % of the run."
    )
    seed: int = setting(0, "an integer from 0 to 2^63 - 1", "Seed of the draws.", ge=0, le=2**63 - 1)

    @model_validator(mode="after")
    def _end_after_start(self) -> RandomSettings:
        _check_end(self.start_step, self.end_step)
        return self


class FreezeOutSettings(Section):
    """`smartfrz.freezeout`: anneal each layer's learning rate to zero along its own cosine and freeze the layer there."""

    t0: float = setting(
        0.8, "a number in (0, 1]", "Share of the run at which the first layer ends, before `growth` is applied.", gt=0, le=1
    )
    growth: Literal["linear", "squared", "cubic"] = setting(
        "cubic",
        "'linear', 'squared' or 'cubic'",
        "How the ends of the layers are spaced: evenly from t0 to 1, then raised to the power 1, 2 or 3.",
    )
    scale_lr: bool = setting(
        True, "true or false", "Divide each layer's learning rate by its end, so that each layer moves as far as it would without freezing."
    )


class AutoFreezeSettings(Section):
    """`smartfrz.autofreeze`: freeze front layers whose gradient norm has changed little since the last interval."""

    quantile: float = setting(
        0.5,
        "a number in (0, 1]",
        "Quantile of the active layers' changes (0.5: the median). The layers in front of the first one with a larger change freeze.",
        gt=0,
        le=1,
    )


class EgeriaSettings(Section):
    """`smartfrz.egeria`: freeze the front layer when its plasticity no longer changes. Requires `probe`."""

    window: int = setting(
        3,
        "an integer >= 2",
        "Freezing stages over which the plasticity is averaged, over which the line is fitted, and for which its slope must stay small.",
        ge=2,
    )
    tolerance: float = setting(
        0.2, "a number in (0, 1)", "A slope counts as small up to this share of the layer's steepest slope so far.", gt=0, lt=1
    )
    refresh: int = setting(3, "an integer >= 1", "Freezing stages between two references; should not exceed `window`.", ge=1)


class PipeTransformerSettings(Section):
    """`smartfrz.pipetransformer`: freeze a share of the remaining layers in each epoch, bounded by the smallest gradient."""

    alpha: float = setting(1 / 3, "a number in (0, 1)", "Share of the remaining layers that freezes in each epoch.", gt=0, lt=1)
    interval: Interval | None = setting(None, f"an integer >= 1, {OR_SHARE}, or null", "Steps per epoch; null: a tenth of the run.")
    gradients: bool = setting(
        True, "true or false", "Freeze at most up to the active block with the smallest gradient norm; false: only the share counts."
    )


class WeightDriftSettings(Section):
    """`smartfrz.weight_drift`: freeze a layer when its weights have moved little between two snapshots."""

    threshold: float = setting(
        1e-3,
        "a number in (0, 1]",
        "Movement relative to the weights (both as sums of absolute values) in one `snapshot_interval`, below which a layer freezes.",
        gt=0,
        le=1,
    )
    start_step: Steps | None = setting(
        None, f"an integer >= 0, {OR_SHARE}, or null", "The step before which nothing freezes; null: after `share` of the run."
    )
    share: float = setting(
        0.5, "a number in [0, 1)", "Share of the run's steps before the first freeze, used if `start_step` is null.", ge=0, lt=1
    )


class ManualSettings(Section):
    """`smartfrz.manual`: freeze only what `engine.smartfrz.freeze(names)` names. No keys."""


class Zero3Settings(Section):
    """`smartfrz.zero3`: how ZeRO stage 3 stores frozen layers."""

    frozen: Literal["sharded", "replicated", "auto"] = setting(
        "sharded",
        "'sharded', 'replicated' or 'auto'",
        "Weights of frozen layers. sharded: unchanged, gathered for each forward; replicated: whole on every rank, never gathered again; "
        "auto: replicated as long as they fit into the memory that freezing has released on the rank.",
    )


class PipelineSettings(Section):
    """`smartfrz.pipeline`: how a pipeline uses the time that its frozen stages no longer need."""

    rebalance: Literal["off", "on_freeze"] = setting(
        "off",
        "'off' or 'on_freeze'",
        "on_freeze: after a freeze or a thaw, layers move to other stages, with their optimizer state, if that makes a step faster.",
    )
    min_gain: float = setting(
        1.05, "a number >= 1", "Layers move only if a step is predicted to be faster by at least this factor (1.05: 5 %).", ge=1
    )
    memory_limit: float | str | None = setting(
        None,
        "bytes (a number > 0, or a text such as '12GiB' or '900MB'), or null",
        "Bytes of weights, gradients, optimizer state and activations that a rank may hold after layers have moved; null: no limit. "
        "Units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB.",
    )

    @field_validator("memory_limit")
    @classmethod
    def _is_a_size(cls, value: float | str | None) -> float | str | None:
        if value is not None and not (_bytes_of(value) or 0) > 0:
            raise PydanticCustomError("size", "not a size")
        return value

    @property
    def memory_bytes(self) -> float | None:
        """`memory_limit` as a number of bytes."""
        return None if self.memory_limit is None else _bytes_of(self.memory_limit)


def _bytes_of(size: float | str) -> float | None:
    """Return the bytes of a number or of a text such as '12GiB'; None for anything else."""
    if isinstance(size, float | int):
        return float(size)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", size, re.IGNORECASE)
    if match is None:
        return None
    number, prefix, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")


class FsdpSettings(Section):
    """`smartfrz.fsdp`: how FSDP2 stores frozen layers."""

    frozen: Literal["sharded", "unsharded"] = setting(
        "sharded",
        "'sharded' or 'unsharded'",
        "Weights of units that are completely frozen. sharded: unchanged, gathered for each forward; unsharded: whole on every rank, not "
        "gathered again.",
    )


class CacheSettings(Section):
    """`smartfrz.cache`: stored outputs of the frozen prefix, so that a batch seen before skips its forward."""

    mode: Literal["off", "auto", "on"] = setting(
        "off",
        "'off', 'auto' or 'on'",
        "auto: used where it is proven exact and measured to pay; on: used where it is proven exact, else an error.",
    )
    memory: float | str = setting(
        "4GiB", "bytes (a number > 0, or a text such as '12GiB' or '900MB')", "Memory of each host for stored rows, for all of its ranks."
    )
    path: str | None = setting(
        None, "a path, or null", "Folder on a local disk for rows that don't fit into `memory`; null: none.", min_length=1
    )
    disk: float | str = setting(
        "16GiB",
        "bytes (a number > 0, or a text such as '12GiB' or '900MB')",
        "Bytes of each host in `path`; without a `path`, nothing is stored on disk.",
    )
    min_gain: float = setting(
        1.05, "a number >= 1", "Mode auto: used only if a step is predicted to be faster by at least this factor (1.05: 5 %).", ge=1
    )
    spot_check: int = setting(
        200, "an integer >= 1", "One in this many forwards that skip the frozen layers is run completely instead, and compared.", ge=1
    )

    @field_validator("memory", "disk")
    @classmethod
    def _is_a_size(cls, value: float | str) -> float | str:
        if not (_bytes_of(value) or 0) > 0:
            raise PydanticCustomError("size", "not a size")
        return value

    @property
    def memory_bytes(self) -> int:
        """`memory` as a number of bytes."""
        return int(_bytes_of(self.memory) or 0)

    @property
    def disk_bytes(self) -> int:
        """`disk` as a number of bytes."""
        return int(_bytes_of(self.disk) or 0)


class GuardSettings(Section):
    """`smartfrz.guard`: undo a freeze that made a metric worse; null: no guard."""

    metric: str = setting(
        "loss",
        "a name",
        "The metric to watch; lower is better. loss: the mean of the values passed to `engine.backward`, over micro-batches and ranks. Any "
        "metric (loss as well, which is then replaced) can be reported with `engine.smartfrz.observe(name=value)` on every rank; the "
        "values of the ranks are averaged.",
        min_length=1,
    )
    tolerance: float = setting(
        0.02,
        "a number in (0, 1]",
        "Relative increase of the smoothed metric since the freeze at which the freeze is undone (0.02: 2 %).",
        gt=0,
        le=1,
    )
    window: Interval = setting(
        50,
        f"an integer >= 1, {OR_SHARE}",
        "Steps for which the guard watches after a freeze; no policy freezes anything meanwhile, and released optimizer state is kept at "
        "least as long. The default is a number of steps because telling a real increase from noise does not take longer in a longer run.",
    )
    smoothing: float = setting(
        0.9,
        "a number in [0, 1)",
        "Weight of the past in the exponential moving average. 0: no smoothing; 0.9: about the last 10 steps.",
        ge=0,
        lt=1,
    )
