"""Future learning rates by formula, for the schedulers of torch, transformers and DeepSpeed that people use.

A scheduler turns the current rate into the next one. For all of these that is lr' = scale * (lr - base) + base + shift, with coefficients
that depend on the position alone, so they are computed for all positions at once, and a chain of schedulers is a chain of such maps. The
operations and their order are those of the scheduler's own code, so the result equals the stepped schedule bit for bit. Sines and powers
are Python's (`math`): numpy's differ in the last bit.

The formulas were read in torch 2.13 (optim/lr_scheduler.py), transformers 5 (optimization.py: lambdas of a LambdaLR) and DeepSpeed 0.19.8
(runtime/lr_schedules.py). Only these classes themselves are known: a subclass may do something else, and is stepped (lr_forecast.py).
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rates = NDArray[np.float64]

# Values of a user's own lambda that a forecast computes; between them it interpolates where a run is longer.
MAX_LAMBDA = 50_000
# Most values that a forecast computes: steps times parameter groups that differ.
MAX_VALUES = 20_000_000


@dataclass(frozen=True)
class _Maps:
    """Consecutive maps lr' = scale * (lr - base) + base + shift of one parameter group, (n,) fp64 each."""

    scale: Rates
    base: Rates
    shift: Rates

    @classmethod
    def scaling(cls, scale: Rates) -> _Maps:
        return cls(scale, np.zeros_like(scale), np.zeros_like(scale))

    @classmethod
    def setting(cls, rates: Rates) -> _Maps:
        return cls(np.zeros_like(rates), rates, np.zeros_like(rates))

    @classmethod
    def joined(cls, parts: Sequence[_Maps]) -> _Maps:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("scale", "base", "shift")))


# The maps that are applied one after another in each step.
_Chain = list[_Maps]


class _UnknownScheduler(Exception):
    """There is no formula for a scheduler."""


def rates_ahead(scheduler: Any, steps: int) -> Rates | None:
    """Return the highest learning rate of each of the next steps, by formula.

    Args:
        scheduler: A scheduler with an `optimizer`. It is not modified.
        steps: Number of steps, >= 1.

    Returns:
        (steps,) fp64, starting with the current rate; None if there is no formula for this scheduler.
    """
    times = 1
    if _name(scheduler) == "smartfrz_ds.integrations.accelerate.PerStep":  # several moves of the user's scheduler per step
        scheduler, times = scheduler.scheduler, int(scheduler.times)
    groups = scheduler.optimizer.param_groups
    moves = (steps - 1) * times
    columns = {_signature(scheduler, k, group): k for k, group in enumerate(groups)}
    if len(columns) * (moves + 1) > MAX_VALUES:
        return None
    highest: Rates | None = None
    try:
        for k in columns.values():
            rates = _run(float(groups[k]["lr"]), _chain(scheduler, k, _position(scheduler), moves) if moves else [])
            highest = rates if highest is None else np.maximum(highest, rates)
    except _UnknownScheduler:
        return None
    finally:
        _values.clear()
    return None if highest is None else np.ascontiguousarray(highest[::times])


def _name(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


def _position(scheduler: Any) -> int:
    """Return how often a scheduler has moved."""
    return int(getattr(scheduler, "last_epoch", getattr(scheduler, "last_batch_iteration", 0)))


def _signature(scheduler: Any, k: int, group: dict[str, Any]) -> tuple[Any, ...]:
    """Return everything that can make the rates of one parameter group differ from those of another one."""
    own = [float(group[name]) for name in ("lr", "initial_lr", "max_lr", "min_lr") if name in group]
    lists: list[Any] = []
    for part in _all_parts(scheduler):
        for name in ("base_lrs", "min_lrs", "max_lrs", "delta_lrs", "org_lrs"):
            lists += [float(values[k])] if (values := getattr(part, name, None)) else []
        lists += [id(part.lr_lambdas[k])] if getattr(part, "lr_lambdas", None) else []
    return (*own, *lists)


def _all_parts(scheduler: Any) -> list[Any]:
    return [scheduler, *(part for child in getattr(scheduler, "_schedulers", ()) for part in _all_parts(child))]


def _run(rate: float, chain: _Chain) -> Rates:
    """Apply a chain of n maps to a rate. Returns (n + 1,), the rate first."""
    if not chain:
        return np.array([rate])
    if len(chain) == 1:
        maps = chain[0]
        if not maps.scale.any() and not maps.shift.any():  # each position sets the rate
            return np.concatenate([[rate], maps.base])
        if not maps.base.any() and not maps.shift.any():
            return np.multiply.accumulate(np.concatenate([[rate], maps.scale]))
    out = [rate]
    columns = [(m.scale.tolist(), m.base.tolist(), m.shift.tolist()) for m in chain]
    for maps_of_step in zip(*(zip(*column, strict=True) for column in columns), strict=True):
        for scale, base, shift in maps_of_step:
            rate = scale * (rate - base) + base + shift
        out.append(rate)
    return np.array(out)


# --- what each scheduler does -----------------------------------------------------------------------------------------------------
# A function takes the scheduler, the number of the parameter group, the position before the first move and the number of moves >= 1.


def _chain(scheduler: Any, k: int, begin: int, count: int) -> _Chain:
    name = _name(scheduler)
    if name not in _FORMULAS:
        raise _UnknownScheduler(name)
    return _FORMULAS[name](scheduler, k, begin, count)


def _positions(begin: int, count: int) -> NDArray[np.int64]:
    return np.arange(begin + 1, begin + count + 1)


# Values of lambdas in the current call of `rates_ahead`: parameter groups usually share one.
_values: dict[tuple[int, int, int], Rates] = {}


def _lambda_values(function: Callable[[int], Any], begin: int, count: int) -> Rates:
    key = id(function), begin, count
    if key not in _values:
        _values[key] = _call(function, begin, count)
    return _values[key]


def _call(function: Callable[[int], Any], begin: int, count: int) -> Rates:
    inner = getattr(function, "func", function)
    known = str(getattr(inner, "__module__", "")).startswith("transformers.")
    if not hasattr(inner, "__code__"):  # an object with a state of its own
        function = copy.deepcopy(function)
    if known or count <= MAX_LAMBDA:
        return np.array([float(function(t)) for t in range(begin + 1, begin + count + 1)])
    points = np.unique(np.linspace(begin + 1, begin + count, MAX_LAMBDA).round().astype(np.int64))
    return np.interp(_positions(begin, count), points, [float(function(t)) for t in points.tolist()])


def _lambda(s: Any, k: int, begin: int, count: int) -> _Chain:
    return [_Maps.setting(float(s.base_lrs[k]) * _lambda_values(s.lr_lambdas[k], begin, count))]


def _multiplicative(s: Any, k: int, begin: int, count: int) -> _Chain:
    return [_Maps.scaling(_lambda_values(s.lr_lambdas[k], begin, count))]


def _step(s: Any, k: int, begin: int, count: int) -> _Chain:
    at = _positions(begin, count)
    return [_Maps.scaling(np.where((at != 0) & (at % s.step_size == 0), float(s.gamma), 1.0))]


def _multi_step(s: Any, k: int, begin: int, count: int) -> _Chain:
    scale = np.ones(count)
    for milestone, often in s.milestones.items():
        if begin < milestone <= begin + count:
            scale[milestone - begin - 1] = s.gamma**often
    return [_Maps.scaling(scale)]


def _constant(s: Any, k: int, begin: int, count: int) -> _Chain:
    at = _positions(begin, count)
    scale = np.where(at == s.total_iters, 1.0 / s.factor if s.factor else math.inf, 1.0)
    return [_Maps.scaling(np.where(at == 0, float(s.factor), scale))]


def _linear(s: Any, k: int, begin: int, count: int) -> _Chain:
    at, change = _positions(begin, count), s.end_factor - s.start_factor
    with np.errstate(all="ignore"):
        scale = 1.0 + change / (s.total_iters * s.start_factor + (at - 1) * change)
    return [_Maps.scaling(np.where(at == 0, float(s.start_factor), np.where(at > s.total_iters, 1.0, scale)))]


def _exponential(s: Any, k: int, begin: int, count: int) -> _Chain:
    return [_Maps.scaling(np.full(count, float(s.gamma)))]


def _polynomial(s: Any, k: int, begin: int, count: int) -> _Chain:
    total, power = s.total_iters, s.power
    scale = np.ones(count)
    for t in range(begin + 1, min(begin + count, total) + 1):
        scale[t - begin - 1] = ((1.0 - t / total) / (1.0 - (t - 1) / total)) ** power
    return [_Maps.scaling(scale)]


def _cosine(s: Any, k: int, begin: int, count: int) -> _Chain:
    period, lowest, at = s.T_max, float(s.eta_min), _positions(begin, count)
    heights = np.array([1 + math.cos(math.pi * t / period) for t in range(begin, begin + count + 1)])
    turns = (at - 1 - period) % (2 * period) == 0  # behind the minimum, where the ratio has no meaning
    with np.errstate(all="ignore"):
        scale = np.where(turns, 1.0, heights[1:] / heights[:-1])
    up = (float(s.base_lrs[k]) - lowest) * (1 - math.cos(math.pi / period)) / 2
    return [_Maps(scale, np.where(turns, 0.0, lowest), np.where(turns, up, 0.0))]


def _one_cycle(s: Any, k: int, begin: int, count: int) -> _Chain:
    kind = getattr(s, "_anneal_func_type", None)
    if begin + count > s.total_steps or kind not in ("cos", "linear"):
        raise _UnknownScheduler
    group, at, rates, start = s.optimizer.param_groups[k], _positions(begin, count), np.empty(count), 0.0
    left = np.ones(count, dtype=bool)
    for number, phase in enumerate(s._schedule_phases):
        end = phase["end_step"]
        here = left if number == len(s._schedule_phases) - 1 else left & (at <= end)
        low, high = float(group[phase["start_lr"]]), float(group[phase["end_lr"]])
        done = (at[here] - start) / (end - start)
        if kind == "cos":
            rates[here] = high + (low - high) / 2.0 * (np.array([math.cos(x) for x in (math.pi * done).tolist()]) + 1)
        else:
            rates[here] = (high - low) * done + low
        left, start = left & ~here, end
    return [_Maps.setting(rates)]


def _chained(s: Any, k: int, begin: int, count: int) -> _Chain:
    return [maps for child in s._schedulers for maps in _chain(child, k, _position(child), count)]


def _sequential(s: Any, k: int, begin: int, count: int) -> _Chain:
    where: dict[int, int] = {}  # positions of the parts
    pieces: list[_Chain] = []
    at, end = begin, begin + count
    while at < end:
        index = bisect_right(s._milestones, at + 1)
        child = s._schedulers[index]
        if index > 0 and s._milestones[index - 1] == at + 1:
            pieces.append(_at_zero(child, k))
            where[index], moves = 0, 1
        else:
            moves = (min(end, s._milestones[index] - 1) if index < len(s._milestones) else end) - at
            begins = where.get(index, _position(child))
            pieces.append(_chain(child, k, begins, moves))
            where[index] = begins + moves
        at += moves
    length = max(len(piece) for piece in pieces)
    for piece in pieces:
        piece += [_Maps.scaling(np.ones(len(piece[0].scale)))] * (length - len(piece))
    return [_Maps.joined([piece[i] for piece in pieces]) for i in range(length)]


def _at_zero(s: Any, k: int) -> _Chain:
    """Return the map of a part of a sequence that begins."""
    if _name(s) not in _FORMULAS or _name(s) in (_TORCH + "SequentialLR", _TORCH + "ChainedScheduler"):
        raise _UnknownScheduler
    if not hasattr(s, "_get_closed_form_lr"):
        return _chain(s, k, -1, 1)
    first = copy.copy(s)
    first.last_epoch = 0
    return [_Maps.setting(np.array([float(first._get_closed_form_lr()[k])]))]


def _warmup(s: Any, begin: int, count: int) -> tuple[Rates, int]:
    """Return the shares of the warm-up of DeepSpeed's schedulers, and their number of positions."""
    positions = range(begin + 1, min(begin + count + 1, s.warmup_num_steps))
    if begin + 1 < 0:
        raise _UnknownScheduler
    if s.warmup_type == "log":
        return np.array([s.inverse_log_warm_up * math.log(t + 1) for t in positions]), len(positions)
    return np.array([t / s.warmup_num_steps for t in positions]), len(positions)


def _warmup_constant(s: Any, k: int, begin: int, count: int) -> _Chain:
    shares, warm = _warmup(s, begin, count)
    shares = np.concatenate([shares, np.ones(count - warm)])
    return [_Maps.setting(s.min_lrs[k] + s.delta_lrs[k] * shares)]


def _warmup_decay(s: Any, k: int, begin: int, count: int) -> _Chain:
    shares, warm = _warmup(s, begin, count)
    left = (s.total_num_steps - _positions(begin, count)[warm:]) / float(max(1.0, s.total_num_steps - s.warmup_num_steps))
    return [_Maps.setting(s.min_lrs[k] + s.delta_lrs[k] * np.concatenate([shares, np.maximum(0.0, left)]))]


def _warmup_cosine(s: Any, k: int, begin: int, count: int) -> _Chain:
    shares, warm = _warmup(s, begin, count)
    shares = s.warmup_min_ratio + shares * (1.0 - s.warmup_min_ratio)
    done = np.minimum(1.0, (_positions(begin, count)[warm:] - s.warmup_num_steps + 1) / max(1, s.total_num_steps - s.warmup_num_steps))
    heights = (1 + np.array([math.cos(x) for x in (math.pi * done).tolist()])) / 2
    rest = np.maximum(0.0, s.cos_min_ratio + (1.0 - s.cos_min_ratio) * heights)
    return [_Maps.setting(s.org_lrs[k] * np.concatenate([shares, rest]))]


def _deepspeed_cycle(s: Any, k: int, begin: int, count: int) -> _Chain:
    at = _positions(begin, count)
    low, high, behind = s.min_lrs[k], s.max_lrs[k], at >= s.total_size
    moved = at[~behind] + 1
    along = 1.0 + moved / s.total_size - np.floor(1 + moved / s.total_size)
    first = along <= s.step_ratio
    with np.errstate(all="ignore"):
        height = np.where(first, along / s.step_ratio, (along - 1) / (s.step_ratio - 1))
        within = moved % s.total_size
        for stairs, half in ((s.first_stair_count, first), (s.second_stair_count, ~first)):
            if stairs > 0:
                up = within * stairs / s.first_step_size
                place = np.where(within <= s.first_step_size, up, (s.total_size - within) * stairs / s.second_step_size)
                height = np.where(half, np.floor(place) / stairs, height)
    rates = np.full(count, float(low))
    rates[~behind] = low + (high - low) * height
    if not s.skip_lr_decay:
        rates[behind] = low / (1 + s.decay_lr_rate * ((at[behind] - s.total_size + 1) / s.decay_step_size))
    return [_Maps.setting(rates)]


_TORCH, _DEEPSPEED = "torch.optim.lr_scheduler.", "deepspeed.runtime.lr_schedules."
_FORMULAS: dict[str, Callable[[Any, int, int, int], _Chain]] = {
    _TORCH + "LambdaLR": _lambda,
    _TORCH + "MultiplicativeLR": _multiplicative,
    _TORCH + "StepLR": _step,
    _TORCH + "MultiStepLR": _multi_step,
    _TORCH + "ConstantLR": _constant,
    _TORCH + "LinearLR": _linear,
    _TORCH + "ExponentialLR": _exponential,
    _TORCH + "PolynomialLR": _polynomial,
    _TORCH + "CosineAnnealingLR": _cosine,
    _TORCH + "OneCycleLR": _one_cycle,
    _TORCH + "SequentialLR": _sequential,
    _TORCH + "ChainedScheduler": _chained,
    _DEEPSPEED + "WarmupLR": _warmup_constant,
    _DEEPSPEED + "WarmupDecayLR": _warmup_decay,
    _DEEPSPEED + "WarmupCosineLR": _warmup_cosine,
    _DEEPSPEED + "OneCycle": _deepspeed_cycle,
}
