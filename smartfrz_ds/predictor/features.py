"""What the predictor reads: a layer's window of snapshots as numbers without scale, the same code in training and in a real run.

Nothing here knows which weight stands in which column: every feature is a norm or an inner product over the sampled weights, so
the predictor can't learn to recognise a layer instead of its movement (raw weights through an MLP do exactly that). Left out,
because figures on network kinds never seen got worse or no better with them: how evenly the weights share an update, mean cosine,
straightness, depth, share of the run that is done.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .constants import MIN_SNAPSHOTS
from .probe import RATIO_LIMIT as _RATIO_LIMIT
from .probe import ProbeTracker, log_lr_ratio

if TYPE_CHECKING:  # policies import this module
    from smartfrz_ds.model.view import View, Window

TOKEN_FEATURES = (
    "age",  # share of the window's steps that lie between this snapshot and the newest, 1 (oldest) .. 0
    "lr_share",  # the same in learning rate spent
    "to_newest",  # distance to the newest snapshot over the largest such distance, 0 .. 1
    "to_oldest",  # distance to the oldest snapshot over the same, 0 .. 2
    "log_step",  # log of (distance to the snapshot before / the mean of these)
    "log_rate",  # the same per learning rate spent
    "cosine",  # between the update into this snapshot and the one out of it, -1 .. 1
)
SCALAR_FEATURES = (
    "log_drift",  # log(||newest - oldest|| / ||newest||)
    "log_prefix_drift",  # the same, root of the sum of squares over this and all earlier active layers
    "log_ratio",  # log of (newest half-window's drift per learning rate / that of the layer's first window)
    "log_prefix_ratio",  # the largest of these over this and all earlier active layers
    "log_lr_remaining",  # log(learning rates still to come / learning rates in the window), 0 when unknown
    "lr_remaining_known",  # 1 or 0
    "log_future",  # the drift still to come: log_drift + growth * log_lr_remaining, growth being the exponent by which distances grew
    "log_prefix_future",  # the same, root of the sum of squares over this and all earlier active layers
    "log_future_share",  # log_future - log(displacement since the first snapshot, relative)
    "log_prefix_future_share",  # the largest of these over this and all earlier active layers
    "log_held_drift",  # log(prefix drift with frozen layers at their last value / without them), 0 where none is frozen
    "log_held_future",  # the same of the drift to come
)

_REMEMBERED = 64  # weights of a layer's first snapshot: a distance over as many is within a tenth, and they go into a checkpoint's JSON
_GROWTH = (0.3, 1.0)  # exponents of distance over learning rate: below a random walk's half is jitter, one is a straight line
_LOG_FLOOR, _LOG_CAP = math.log(1e-8), math.log(1e2)  # a relative drift below fp32's resolution, and one no training has


@dataclass(frozen=True, kw_only=True)
class WindowStatistics:
    """Norms over the sampled weights of `layers` windows of `n` snapshots, each entry fp32.

    norm: (layers,) of the newest snapshot. to_newest, to_oldest: (layers, n). step: (layers, n - 1), from each snapshot to the next.
    cosine: (layers, n - 2), of consecutive updates, 0 where one of them is zero.
    """

    norm: Tensor
    to_newest: Tensor
    to_oldest: Tensor
    step: Tensor
    cosine: Tensor


def window_statistics(weights: Tensor) -> WindowStatistics:
    """All passes over the sampled weights: weights (layers, n >= 2, sample_size) fp32, oldest snapshot first."""
    update = weights.diff(dim=1)
    step = torch.linalg.vector_norm(update, dim=2)
    product = torch.linalg.vecdot(update[:, 1:], update[:, :-1])
    length = step[:, 1:] * step[:, :-1]
    return WindowStatistics(
        norm=torch.linalg.vector_norm(weights[:, -1], dim=1),
        to_newest=torch.linalg.vector_norm(weights - weights[:, -1:], dim=2),
        to_oldest=torch.linalg.vector_norm(weights - weights[:, :1], dim=2),
        step=step,
        cosine=_ratio(product, length).clamp(-1, 1),
    )


@dataclass(kw_only=True)
class LayerMemory:
    """What must be remembered of a layer beyond its window.

    first_step, snapshots, log_drift, log_lr: the reference, the first half of the layer's first window: where it began, its number of
    snapshots, log relative drift and log learning rate spent in it (None: none was spent yet, no reference).
    first: at most _REMEMBERED of the sampled weights, evenly spread, at the first snapshot.
    last_...: the values when the layer was last active. A frozen layer counts with them in the held features of those behind it: one
    early freeze makes all later layers look still, and how much of that is due to the freeze must be seen.
    """

    first_step: int
    snapshots: int
    log_drift: float
    log_lr: float | None
    first: list[float]
    last_log_drift: float = 0.0
    last_log_ratio: float = 0.0
    last_log_future: float = 0.0
    last_log_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """The features of the layers that can be judged, front to back.

    names: the layers. tokens: (layers, n, len(TOKEN_FEATURES)) fp32, newest snapshot last, shorter windows padded with zeros in front.
    mask: (layers, n) bool, true where there is a snapshot. scalars: (layers, len(SCALAR_FEATURES)) fp32.
    probe: (layers, len(PROBE_FEATURES)) fp32, a row of NaN where nothing is known of the layer's output; None: of no layer.
    """

    names: tuple[str, ...]
    tokens: Tensor
    mask: Tensor
    scalars: Tensor
    probe: Tensor | None = None


class FeatureExtractor:
    """Turns views into features, and remembers for each layer how it moved at first."""

    def __init__(self) -> None:
        self.memory: dict[str, LayerMemory] = {}
        self.probe = ProbeTracker()

    def extract(self, view: View, *, changes: Mapping[str, float] | None = None) -> FeatureBatch:
        """The features of every active layer (not the head) with at least MIN_SNAPSHOTS snapshots.

        Where the view has `grams` (of each layer its centered Gram matrix on the probe at this stage, (n, n) fp64), the batch has probe
        features from the second such stage on. changes: the same already compared, of each layer 1 - CKA since the last stage; recordings
        have them.
        Raises ValueError, naming the layer, when a window holds NaN, infinity or values whose norm overflows fp32.
        """
        frozen = set(view.frozen)
        body = [layer.name for layer in view.layers if layer.kind != "head"]
        measured = self._measure(
            {name: view.windows[name] for name in body if name in view.windows and self._is_needed(name, view, frozen)}
        )

        names, tokens, scalars = [], [], []
        active = [0.0, 0.0]  # sums of squares over the active layers: drift, drift to come
        held = [0.0, 0.0]  # the same over the frozen ones, at their last values
        largest_ratio, largest_share = -_RATIO_LIMIT, _LOG_FLOOR
        for name in body:
            layer, memory = measured.get(name), self.memory.get(name)
            judged = layer is not None and name not in frozen and layer.snapshots >= MIN_SNAPSHOTS
            if layer is not None and (judged or memory is None):
                window = view.windows[name]
                remaining = _log_remaining(view, window)
                memory = self._remember(name, layer, window, remaining or 0.0, keep=judged)
            elif memory is None:
                continue  # nothing was ever seen of it: all its weights are the user's, frozen before the run
            sums = held if name in frozen else active
            sums[0] += math.exp(2 * memory.last_log_drift)
            sums[1] += math.exp(2 * memory.last_log_future)
            if name not in frozen:
                largest_ratio = max(largest_ratio, memory.last_log_ratio)
                largest_share = max(largest_share, memory.last_log_share)
            if not judged:
                continue
            assert layer is not None
            scalars.append(
                [
                    memory.last_log_drift,
                    _log_root(active[0]),
                    memory.last_log_ratio,
                    largest_ratio,
                    0.0 if remaining is None else remaining,
                    float(remaining is not None),
                    memory.last_log_future,
                    _log_root(active[1]),
                    memory.last_log_share,
                    largest_share,
                    _log_root(active[0] + held[0]) - _log_root(active[0]),
                    _log_root(active[1] + held[1]) - _log_root(active[1]),
                ]
            )
            names.append(name)
            tokens.append(layer.tokens)
        return replace(_pad(names, tokens, scalars), probe=self.probe.rows(view, names, changes))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: "layers": layer name to the fields of its LayerMemory; "probe": as ProbeTracker.state_dict."""
        return {"layers": {name: asdict(memory) for name, memory in self.memory.items()}, "probe": self.probe.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory = {name: LayerMemory(**fields) for name, fields in state["layers"].items()}
        self.probe.load_state_dict(state["probe"])

    def _is_needed(self, name: str, view: View, frozen: set[str]) -> bool:
        if name in frozen and name in self.memory:
            return False  # held values count, its window stands still
        return view.windows[name].steps.shape[0] >= 2

    def _measure(self, windows: Mapping[str, Window]) -> dict[str, _Measured]:
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, window in windows.items():
            groups[tuple(window.weights.shape)].append(name)
        measured = {}
        for names in groups.values():
            statistics = window_statistics(torch.stack([windows[name].weights for name in names]).float())
            tokens = _tokens(statistics, [windows[name] for name in names])
            finite = (statistics.to_newest.sum(1) + statistics.norm + statistics.step.sum(1)).isfinite().tolist()
            log_drift = _log(_ratio(statistics.to_newest[:, 0], statistics.norm, zero_over_zero=0.0)).tolist()
            norm = statistics.norm.tolist()
            for i, name in enumerate(names):
                if not finite[i]:
                    raise ValueError(f"layer {name}: its sampled weights hold NaN, infinity or values too large for fp32")
                measured[name] = _Measured(
                    tokens=tokens[i],
                    snapshots=tokens.shape[1],
                    norm=norm[i],
                    log_drift=log_drift[i],
                    to_newest=statistics.to_newest[i].tolist(),
                    to_oldest=statistics.to_oldest[i].tolist(),
                )
        return measured

    def _remember(self, name: str, layer: _Measured, window: Window, log_remaining: float, *, keep: bool) -> LayerMemory:
        """Updates the layer's memory, or only makes one for this moment when the layer isn't to be judged yet.

        log_remaining: 0 when unknown."""
        memory = self.memory.get(name)
        lr = window.lr_spent.tolist()
        first_step = int(window.steps[0])
        # While the window still begins where it began first, the reference grows with it.
        if memory is None or memory.log_lr is None or memory.first_step == first_step:
            half = max(2, layer.snapshots // 2)
            half_spent = lr[half - 1] - lr[0]
            memory = LayerMemory(
                first_step=first_step,
                snapshots=half,
                log_drift=_log_relative(layer.to_oldest[half - 1], layer.norm),
                log_lr=math.log(half_spent) if half_spent > 0 else None,
                first=_thin(window.weights[0]) if memory is None else memory.first,
            )
        span = min(memory.snapshots, layer.snapshots)
        drift = _log_relative(layer.to_newest[layer.snapshots - span], layer.norm)
        spent = lr[-1] - lr[-span]
        memory.last_log_ratio = 0.0
        if memory.log_lr is not None:
            # A learning rate of zero moves nothing: there is nothing to divide by, and the drift alone says it.
            log_spent = math.log(spent) if spent > 0 else memory.log_lr
            memory.last_log_ratio = _clamp((drift - log_spent) - (memory.log_drift - memory.log_lr), -_RATIO_LIMIT, _RATIO_LIMIT)
        memory.last_log_drift = layer.log_drift
        memory.last_log_future = _clamp(layer.log_drift + _growth(layer, window) * log_remaining, _LOG_FLOOR, _LOG_CAP)
        memory.last_log_share = _clamp(memory.last_log_future - _log_displacement(memory.first, window.weights[-1]), _LOG_FLOOR, _LOG_CAP)
        if keep:
            self.memory[name] = memory
        return memory


@dataclass(frozen=True, kw_only=True)
class _Measured:
    tokens: Tensor  # (n, len(TOKEN_FEATURES))
    snapshots: int
    norm: float
    log_drift: float
    to_newest: list[float]  # (n,)
    to_oldest: list[float]  # (n,)


def _thin(weights: Tensor) -> list[float]:
    """At most _REMEMBERED of weights (sample_size,), evenly spread."""
    return weights[:: -(-len(weights) // _REMEMBERED)].tolist()


def _log_displacement(first: list[float], newest: Tensor) -> float:
    """log of the relative distance of the newest snapshot (sample_size,) from the remembered one; 0 for one of another sample size."""
    now = newest[:: -(-len(newest) // _REMEMBERED)].float()
    if len(now) != len(first):
        return 0.0
    return _log_relative(float(torch.linalg.vector_norm(now - torch.tensor(first))), float(torch.linalg.vector_norm(now)))


def _growth(layer: _Measured, window: Window) -> float:
    """The exponent by which the distance from the newest snapshot grew with learning rate over the older half of the window."""
    lr = window.lr_spent if float(window.lr_spent[-1]) > float(window.lr_spent[0]) else window.steps.double()
    half = min(int(torch.searchsorted(lr.contiguous(), float(lr[0] + lr[-1]) / 2)), layer.snapshots - 2)
    whole, later = layer.to_newest[0], layer.to_newest[half]
    if half == 0 or whole <= 0.0 or later <= 0.0 or float(lr[half]) >= float(lr[-1]):
        return 0.5
    span = math.log(float(lr[-1] - lr[0]) / float(lr[-1] - lr[half]))
    return _clamp(math.log(whole / later) / span, *_GROWTH) if span > 0 else 0.5


def _tokens(statistics: WindowStatistics, windows: Sequence[Window]) -> Tensor:
    """(layers, n, len(TOKEN_FEATURES)) fp32."""
    steps = torch.stack([window.steps for window in windows]).double()
    lr = torch.stack([window.lr_spent for window in windows]).double()
    age = (steps[:, -1:] - steps) / (steps[:, -1:] - steps[:, :1])
    lr_span = lr[:, -1:] - lr[:, :1]
    lr_share = torch.where(lr_span > 0, (lr[:, -1:] - lr) / lr_span.clamp_min(1e-300), age)
    largest = statistics.to_newest.amax(1, keepdim=True)
    log_step = _log_to_mean(statistics.step)
    log_lr = _log_to_mean(lr.diff(dim=1).float())
    nothing = torch.zeros_like(log_step[:, :1])
    columns = [
        age.float(),
        lr_share.float(),
        _ratio(statistics.to_newest, largest),
        _ratio(statistics.to_oldest, largest),
        torch.cat([log_step[:, :1], log_step], 1),  # the oldest snapshot has no update into it: it takes its neighbour's
        torch.cat([(log_step - log_lr)[:, :1], log_step - log_lr], 1),
        torch.cat([nothing, statistics.cosine, nothing], 1),
    ]
    return torch.stack(columns, dim=2)


def _log_remaining(view: View, window: Window) -> float | None:
    """log(learning rates still to come / learning rates in the window), clamped; None when nobody knows."""
    spent = float(window.lr_spent[-1] - window.lr_spent[0])
    remaining = view.lr_remaining
    if remaining is None:
        if view.total_steps is None:
            return None
        # The length is known and the schedule is not: the learning rate stays what it was. Too high for a decay, so the cautious side.
        remaining = spent * max(0, view.total_steps - view.step) / float(window.steps[-1] - window.steps[0])
    return log_lr_ratio(remaining, spent)


def _pad(names: list[str], tokens: list[Tensor], scalars: list[list[float]]) -> FeatureBatch:
    n = max((len(t) for t in tokens), default=0)
    padded = torch.zeros(len(names), n, len(TOKEN_FEATURES))
    mask = torch.zeros(len(names), n, dtype=torch.bool)
    for i, token in enumerate(tokens):
        padded[i, n - len(token) :] = token
        mask[i, n - len(token) :] = True
    return FeatureBatch(
        names=tuple(names), tokens=padded, mask=mask, scalars=torch.tensor(scalars).float().reshape(len(names), len(SCALAR_FEATURES))
    )


def _ratio(top: Tensor, bottom: Tensor, zero_over_zero: float = 0.0) -> Tensor:
    """top / bottom, and where the bottom is 0: zero_over_zero for a zero top, else infinity (a log clamps it)."""
    safe = torch.where(bottom == 0, torch.ones_like(bottom), bottom)
    at_zero = torch.where(top == 0, zero_over_zero, math.inf)
    return torch.where(bottom == 0, at_zero.to(top.dtype), top / safe)


def _log_to_mean(x: Tensor) -> Tensor:
    """log(x / its mean over the window), within +-_RATIO_LIMIT; all zero where the mean is zero. x: (layers, n - 1), >= 0."""
    return torch.where(x.mean(1, keepdim=True) == 0, torch.zeros_like(x), _ratio(x, x.mean(1, keepdim=True)).log()).clamp(
        -_RATIO_LIMIT, _RATIO_LIMIT
    )


def _log(x: Tensor) -> Tensor:
    return x.log().clamp(_LOG_FLOOR, _LOG_CAP)


def _log_relative(distance: float, norm: float) -> float:
    if distance == 0.0:
        return _LOG_FLOOR
    return _LOG_CAP if norm == 0.0 else _clamp(math.log(distance / norm), _LOG_FLOOR, _LOG_CAP)


def _log_root(square: float) -> float:
    return _clamp(0.5 * math.log(square), _LOG_FLOOR, _LOG_CAP)


def _clamp(x: float, low: float, high: float) -> float:
    return min(high, max(low, x))
