"""The sub-sections of the settings: one for each policy, then those of engines and of the guard. And how a key is declared."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .shares import percent_of


def setting(default: Any, allowed: str, meaning: str, **limits: Any) -> Any:
    """A pydantic field: `allowed` and `meaning` are the words of the errors and of the documentation; `limits` enforce them."""
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


# A number of steps: an integer, or a share of the run that becomes one when the length of the run is known (intervals.py).
Steps = Annotated[int, Field(ge=0)] | Annotated[str, AfterValidator(_is_share)]
Interval = Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(_is_positive_share)]
OR_SHARE = "or a share of the run such as '10%'"
PolicyName = Literal[
    "attention",
    "linear",
    "late",
    "random",
    "freezeout",
    "autofreeze",
    "egeria",
    "pipetransformer",
    "weight_drift",
    "manual",
]


def _check_end(start: int | str | None, end: int | str | None) -> None:
    """A number and a share can only be compared when the length of the run is known."""
    start = 0 if start is None and not isinstance(end, str) else start
    if isinstance(start, int) and isinstance(end, int) and end <= start:
        raise ValueError(f"end_step: got {end}; allowed: an integer > start_step ({start}), {OR_SHARE}, or null")
    first, last = percent_of(start), percent_of(end)
    if last is not None and last <= (first or 0.0) and not isinstance(start, int):
        raise ValueError(f"end_step: got '{end}'; allowed: a share > start_step ({start}), an integer, or null")


class Section(BaseModel):
    # strict: "50" and true are no integers. Non-finite numbers are refused everywhere.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class AttentionSettings(Section):
    """`smartfrz.attention`: SmartFRZ's attention predictor."""

    predictor: str | None = setting(
        None, "a path of a .safetensors file, or null", "Weights made by `smartfrz train-predictor`; null: the shipped ones.", min_length=1
    )
    threshold: float | None = setting(
        None,
        "a number in (0, 1), or null",
        "A layer counts as converged from this probability on; null: the predictor file's own.",
        gt=0,
        lt=1,
    )
    patience: int = setting(2, "an integer >= 1", "Freezing stages in a row that must agree before a layer freezes.", ge=1)
    mode: Literal["auto", "budget"] = setting(
        "auto",
        "'auto' or 'budget'",
        "auto: a layer freezes once it has converged, so that what is saved follows from the run; budget: what is saved is given, and the "
        "predictor and the learning rates still to come decide which layers and when. `threshold` and `patience` belong to auto.",
    )
    budget: float = setting(
        0.3,
        "a number in (0, 0.6]",
        "Mode budget: share of the whole run's training FLOPs (forward and backward) that is to be saved.",
        gt=0,
        le=0.6,
    )


class LinearSettings(Section):
    """`smartfrz.linear`: front layers freeze one after the other, evenly between two steps."""

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
    """`smartfrz.late`: the whole body freezes at one step."""

    start_step: Steps | None = setting(
        None, f"an integer >= 0, {OR_SHARE}, or null", "The step at which everything that may freeze does; null: after `share` of the run."
    )
    share: float = setting(0.7, "a number in [0, 1)", "Share of the run's steps before it, where `start_step` is null.", ge=0, lt=1)


class RandomSettings(Section):
    """`smartfrz.random`: chance decides which layers and when. The front ones with `order` front_to_back, any with `any`."""

    ratio: float | None = setting(
        None,
        "a number in (0, 1], or null",
        "Share of the layers that freeze by the end; null, or more than it: `max_frozen_fraction`.",
        gt=0,
        le=1,
    )
    start_step: Steps | None = setting(
        None, f"an integer >= 0, {OR_SHARE}, or null", "The first step that may be drawn; null: after a fifth of the run."
    )
    end_step: Steps | None = setting(
        None, f"an integer > start_step, {OR_SHARE}, or null", "The last step that may be drawn; null: after four fifths of the run."
    )
    seed: int = setting(0, "an integer from 0 to 2^63 - 1", "Of the draws.", ge=0, le=2**63 - 1)

    @model_validator(mode="after")
    def _end_after_start(self) -> RandomSettings:
        _check_end(self.start_step, self.end_step)
        return self


class FreezeOutSettings(Section):
    """`smartfrz.freezeout`: each layer's learning rate falls to zero along a cosine of its own, and there the layer freezes."""

    t0: float = setting(
        0.8, "a number in (0, 1]", "Share of the run at which the first layer ends, before `growth` is applied to it.", gt=0, le=1
    )
    growth: Literal["linear", "squared", "cubic"] = setting(
        "cubic", "'linear', 'squared' or 'cubic'", "The ends of the layers: evenly from t0 to 1, and these to the power 1, 2 or 3."
    )
    scale_lr: bool = setting(
        True, "true or false", "Divide each layer's learning rate by its end, so that all layers travel as far as without freezing."
    )


class AutoFreezeSettings(Section):
    """`smartfrz.autofreeze`: front layers whose gradient norm has changed little since the last interval freeze."""

    quantile: float = setting(
        0.5,
        "a number in (0, 1]",
        "Quantile of the active layers' changes (0.5: the median); the layers in front of the first with a larger change freeze.",
        gt=0,
        le=1,
    )


class EgeriaSettings(Section):
    """`smartfrz.egeria`: the front layer freezes when its plasticity no longer changes. Needs `probe`."""

    window: int = setting(
        3,
        "an integer >= 2",
        "Freezing stages over which the plasticity is averaged, over which a line is fitted, and at which its slope must stay small.",
        ge=2,
    )
    tolerance: float = setting(0.2, "a number in (0, 1)", "A slope is small up to this share of the layer's steepest so far.", gt=0, lt=1)
    refresh: int = setting(3, "an integer >= 1", "Freezing stages from one reference to the next; best no longer than `window`.", ge=1)


class PipeTransformerSettings(Section):
    """`smartfrz.pipetransformer`: with each epoch a share of the layers that are left freezes, bounded by the flattest gradient."""

    alpha: float = setting(1 / 3, "a number in (0, 1)", "That share.", gt=0, lt=1)
    interval: Interval | None = setting(None, f"an integer >= 1, {OR_SHARE}, or null", "Steps of an epoch; null: a tenth of the run.")
    gradients: bool = setting(
        True, "true or false", "Freeze no further than up to the active block with the smallest gradient norm; false: the share alone."
    )


class WeightDriftSettings(Section):
    """`smartfrz.weight_drift`: a layer freezes when its weights have moved little from one snapshot to the next."""

    threshold: float = setting(
        1e-3,
        "a number in (0, 1]",
        "Movement relative to the weights, both as sums of absolute values, in one `snapshot_interval`.",
        gt=0,
        le=1,
    )
    start_step: Steps | None = setting(
        None, f"an integer >= 0, {OR_SHARE}, or null", "The step before which nothing freezes; null: after `share` of the run."
    )
    share: float = setting(0.5, "a number in [0, 1)", "Share of the run's steps before it, where `start_step` is null.", ge=0, lt=1)


class ManualSettings(Section):
    """`smartfrz.manual`: nothing freezes by itself, only `engine.smartfrz.freeze(names)` does; no keys."""


class Zero3Settings(Section):
    """`smartfrz.zero3`: what ZeRO stage 3 does with frozen layers."""

    frozen: Literal["sharded", "replicated", "auto"] = setting(
        "sharded",
        "'sharded', 'replicated' or 'auto'",
        "Weights of frozen layers: sharded: as before, gathered for each forward; replicated: whole on every rank, never gathered again; "
        "auto: replicated as long as the memory that the freezes have released on a rank pays for it.",
    )


class PipelineSettings(Section):
    """`smartfrz.pipeline`: what a pipeline does with the time that its frozen stages no longer need."""

    rebalance: Literal["off", "on_freeze"] = setting(
        "off",
        "'off' or 'on_freeze'",
        "on_freeze: after a freeze or a thaw, layers move to other stages, with their optimizer state, where that makes a step faster.",
    )
    min_gain: float = setting(
        1.05, "a number >= 1", "Layers move only where a step is predicted to be faster by this factor (1.05: 5 %).", ge=1
    )
    memory_limit: float | str | None = setting(
        None,
        "bytes (a number > 0, or a text such as '12GiB' or '900MB'), or null",
        "Bytes of weights, gradients, optimizer state and activations that a rank may hold after layers have moved; null: no limit.",
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
    """Bytes of a number or of a text such as '12GiB'; None for anything else."""
    if isinstance(size, float | int):
        return float(size)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", size, re.IGNORECASE)
    if match is None:
        return None
    number, prefix, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")


class FsdpSettings(Section):
    """`smartfrz.fsdp`: what FSDP2 does with frozen layers."""

    frozen: Literal["sharded", "unsharded"] = setting(
        "sharded",
        "'sharded' or 'unsharded'",
        "Weights of units of which everything is frozen: sharded: as before, gathered for each forward; unsharded: whole on every rank, "
        "not gathered again.",
    )


class GuardSettings(Section):
    """`smartfrz.guard`: takes a freeze back that made a metric worse; null: no guard."""

    metric: str = setting(
        "loss",
        "a name",
        "What is watched; lower is better. loss: the mean of what goes into `engine.backward`, over micro-batches and ranks. Any metric "
        "(loss too, in its place) can be told with `engine.smartfrz.observe(name=value)`, on every rank; the ranks' values are averaged.",
        min_length=1,
    )
    tolerance: float = setting(
        0.02,
        "a number in (0, 1]",
        "Relative worsening of the smoothed metric since the freeze from which on it is taken back (0.02: 2 %).",
        gt=0,
        le=1,
    )
    window: Interval = setting(
        50,
        f"an integer >= 1, {OR_SHARE}",
        "Steps after a freeze in which the guard watches; no policy freezes anything more meanwhile. Released optimizer state is kept at "
        "least as long. The default is a number, as what is needed to tell a worsening from noise does not grow with the run.",
    )
    smoothing: float = setting(
        0.9,
        "a number in [0, 1)",
        "Weight of the past in the exponential mean, for each step: 0: each step's value as it is, 0.9: about the last 10 steps.",
        ge=0,
        lt=1,
    )
