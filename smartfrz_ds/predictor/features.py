"""Input features of the predictor: a layer's window of snapshots as scale-free numbers, with the same code in training and in a real run.

Every feature is a norm or an inner product over the sampled weights, independent of which weight is in which column.
The predictor can therefore not learn to recognize a layer instead of its movement, as an MLP on raw weights does.
Features that did not improve results on unseen network kinds were left out: how evenly the weights share an update,
mean cosine, straightness, depth, share of the run that is done.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .constants import MIN_SNAPSHOTS
from .logs import LOG_CAP, LOG_FLOOR, clamp, log, log_relative, log_root, log_to_mean, ratio
from .probe_features import RATIO_LIMIT, ProbeTracker, log_lr_ratio

if TYPE_CHECKING:  # policies import this module
    from smartfrz_ds.model.view import View, Window

TOKEN_FEATURES = (
    "age",  # share of the window's steps between this snapshot and the newest, 1 (oldest) .. 0
    "lr_share",  # the same share of the learning rate spent
    "to_newest",  # distance to the newest snapshot / the largest such distance, 0 .. 1
    "to_oldest",  # distance to the oldest snapshot / the same, 0 .. 2
    "log_step",  # log(distance to the previous snapshot / the mean of these distances)
    "log_rate",  # the same per learning rate spent
    "cosine",  # cosine between the update into this snapshot and the one out of it, -1 .. 1
)
SCALAR_FEATURES = (
    "log_drift",  # log(||newest - oldest|| / ||newest||)
    "log_prefix_drift",  # the same as a root of the sum of squares over this and all earlier active layers
    "log_ratio",  # log(drift per learning rate in the newest half-window / that of the layer's first window)
    "log_prefix_ratio",  # maximum of log_ratio over this and all earlier active layers
    "log_lr_remaining",  # log(remaining learning rates / learning rates in the window), 0 if unknown
    "lr_remaining_known",  # 1 or 0
    "log_future",  # remaining drift: log_drift + growth * log_lr_remaining, where growth is the exponent by which distances grew
    "log_prefix_future",  # the same as a root of the sum of squares over this and all earlier active layers
    "log_future_share",  # log_future - log(relative displacement since the first snapshot)
    "log_prefix_future_share",  # maximum of log_future_share over this and all earlier active layers
    "log_held_drift",  # log(prefix drift with frozen layers at their last value / without them), 0 if none is frozen
    "log_held_future",  # the same for the remaining drift
)

_REMEMBERED = 64  # weights kept of a layer's first snapshot: enough for a distance within 10 %, and small enough for a checkpoint's JSON
_CACHED = 2**17  # weights that are measured together
_GROWTH = (0.3, 1.0)  # exponents of distance over learning rate: below a random walk's 0.5 is jitter, 1 is a straight line


@dataclass(frozen=True, kw_only=True)
class WindowStatistics:
    """Norms over the sampled weights of `layers` windows of `n` snapshots, all fp32.

    Attributes:
        norm: (layers,), norm of the newest snapshot.
        to_newest: (layers, n), distance to the newest snapshot.
        to_oldest: (layers, n), distance to the oldest snapshot.
        step: (layers, n - 1), distance from each snapshot to the next.
        cosine: (layers, n - 2), cosine between consecutive updates, 0 if one of them is zero.
    """

    norm: Tensor
    to_newest: Tensor
    to_oldest: Tensor
    step: Tensor
    cosine: Tensor


def window_statistics(weights: Tensor) -> WindowStatistics:
    """Compute all statistics that require a pass over the sampled weights.

    Args:
        weights: (layers, n >= 2, sample_size) fp32, oldest snapshot first.
    """
    update = weights.diff(dim=1)
    step = torch.linalg.vector_norm(update, dim=2)
    product = torch.linalg.vecdot(update[:, 1:], update[:, :-1])
    length = step[:, 1:] * step[:, :-1]
    return WindowStatistics(
        norm=torch.linalg.vector_norm(weights[:, -1], dim=1),
        to_newest=torch.linalg.vector_norm(weights - weights[:, -1:], dim=2),
        to_oldest=torch.linalg.vector_norm(weights - weights[:, :1], dim=2),
        step=step,
        cosine=ratio(product, length).clamp(-1, 1),
    )


def _statistics(windows: list[Tensor]) -> WindowStatistics:
    """Return the statistics of windows of one shape, some layers at a time: all of a large model would not fit into a cache."""
    layers = max(1, _CACHED // max(1, windows[0].numel()))
    parts = [window_statistics(torch.stack(windows[k : k + layers]).float()) for k in range(0, len(windows), layers)]
    return WindowStatistics(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(WindowStatistics)})


@dataclass(kw_only=True)
class LayerMemory:
    """The values that are remembered of a layer beyond its window.

    The reference is the first half of the layer's first window. A frozen layer contributes its last values to the
    held features of the layers behind it: one early freeze makes all later layers look converged, and the predictor
    must see how much of that is due to the freeze.

    Attributes:
        first_step: Step at which the reference began.
        snapshots: Number of snapshots in the reference.
        log_drift: Log relative drift in the reference.
        log_lr: Log learning rate spent in the reference; None: none was spent yet, so there is no reference.
        first: At most _REMEMBERED of the sampled weights at the first snapshot, evenly spaced.
        last_log_drift: Value when the layer was last active.
        last_log_ratio: Value when the layer was last active.
        last_log_future: Value when the layer was last active.
        last_log_share: Value when the layer was last active.
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
    """Features of the layers that can be judged, front to back.

    Attributes:
        names: Names of the layers.
        tokens: (layers, n, len(TOKEN_FEATURES)) fp32, newest snapshot last; shorter windows are padded with zeros in
            front.
        mask: (layers, n) bool, true for snapshots.
        scalars: (layers, len(SCALAR_FEATURES)) fp32.
        probe: (layers, len(PROBE_FEATURES)) fp32, a row of NaN for a layer without a known output; None: for all
            layers.
    """

    names: tuple[str, ...]
    tokens: Tensor
    mask: Tensor
    scalars: Tensor
    probe: Tensor | None = None


class FeatureExtractor:
    """Converts views to features, and remembers how each layer moved at first."""

    def __init__(self) -> None:
        self.memory: dict[str, LayerMemory] = {}
        self.probe = ProbeTracker()

    def extract(self, view: View, *, changes: Mapping[str, float] | None = None) -> FeatureBatch:
        """Compute the features of every active layer (except the head) with at least MIN_SNAPSHOTS snapshots.

        If the view has `grams`, the batch has probe features from the second such stage on.

        Args:
            view: The run as seen at this freezing stage. Its `grams` are the centered Gram matrices of the layers on
                the probe, (n, n) fp64.
            changes: 1 - CKA of each layer since the last stage, instead of `grams`; available in recordings.

        Raises:
            ValueError: A window contains NaN, infinity or values whose norm overflows fp32; names the layer.
        """
        frozen = set(view.frozen)
        body = [layer.name for layer in view.layers if layer.kind != "head"]
        measured = self._measure(
            {name: view.windows[name] for name in body if name in view.windows and self._is_needed(name, view, frozen)}
        )

        names, tokens, scalars = [], [], []
        active = [0.0, 0.0]  # sums of squares over the active layers: drift, remaining drift
        held = [0.0, 0.0]  # the same over the frozen layers, at their last values
        largest_ratio, largest_share = -RATIO_LIMIT, LOG_FLOOR
        for name in body:
            layer, memory = measured.get(name), self.memory.get(name)
            judged = layer is not None and name not in frozen and layer.snapshots >= MIN_SNAPSHOTS
            if layer is not None and (judged or memory is None):
                remaining = _log_remaining(view, layer)
                memory = self._remember(name, layer, view.windows[name].weights, remaining or 0.0, keep=judged)
            elif memory is None:
                continue  # never observed: all of its weights were frozen by the user before the run
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
                    log_root(active[0]),
                    memory.last_log_ratio,
                    largest_ratio,
                    0.0 if remaining is None else remaining,
                    float(remaining is not None),
                    memory.last_log_future,
                    log_root(active[1]),
                    memory.last_log_share,
                    largest_share,
                    log_root(active[0] + held[0]) - log_root(active[0]),
                    log_root(active[1] + held[1]) - log_root(active[1]),
                ]
            )
            names.append(name)
            tokens.append(layer.tokens)
        return replace(_pad(names, tokens, scalars), probe=self.probe.rows(view, names, changes))

    def state_dict(self) -> dict[str, Any]:
        """Return JSON-able data: "layers", layer name -> fields of its LayerMemory; "probe", as in ProbeTracker.state_dict."""
        return {"layers": {name: asdict(memory) for name, memory in self.memory.items()}, "probe": self.probe.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.memory = {name: LayerMemory(**fields) for name, fields in state["layers"].items()}
        self.probe.load_state_dict(state["probe"])

    def _is_needed(self, name: str, view: View, frozen: set[str]) -> bool:
        if name in frozen and name in self.memory:
            return False  # held values count; its window no longer changes
        return view.windows[name].steps.shape[0] >= 2

    def _measure(self, windows: Mapping[str, Window]) -> dict[str, _Measured]:
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, window in windows.items():
            groups[tuple(window.weights.shape)].append(name)
        measured = {}
        for names in groups.values():
            statistics = _statistics([windows[name].weights for name in names])
            tokens = _tokens(statistics, [windows[name] for name in names])
            finite = (statistics.to_newest.sum(1) + statistics.norm + statistics.step.sum(1)).isfinite().tolist()
            log_drift = log(ratio(statistics.to_newest[:, 0], statistics.norm, zero_over_zero=0.0)).tolist()
            norm = statistics.norm.tolist()
            for i, name in enumerate(names):
                if not finite[i]:
                    raise ValueError(f"layer {name}: its sampled weights contain NaN, infinity or values too large for fp32")
                measured[name] = _Measured(
                    tokens=tokens[i],
                    snapshots=tokens.shape[1],
                    norm=norm[i],
                    log_drift=log_drift[i],
                    to_newest=statistics.to_newest[i].tolist(),
                    to_oldest=statistics.to_oldest[i].tolist(),
                    steps=windows[name].steps.tolist(),
                    lr_spent=windows[name].lr_spent.tolist(),
                )
        return measured

    def _remember(self, name: str, layer: _Measured, weights: Tensor, log_remaining: float, *, keep: bool) -> LayerMemory:
        """Update the layer's memory, or create a temporary one if the layer cannot be judged yet.

        Args:
            name: Name of the layer.
            layer: Its measurements.
            weights: (n, sample_size), its window.
            log_remaining: Log of the remaining learning rate; 0 if unknown.
            keep: Whether to store the memory.
        """
        memory = self.memory.get(name)
        lr = layer.lr_spent
        first_step = layer.steps[0]
        # The reference grows as long as the window starts at its original beginning.
        if memory is None or memory.log_lr is None or memory.first_step == first_step:
            half = max(2, layer.snapshots // 2)
            half_spent = lr[half - 1] - lr[0]
            memory = LayerMemory(
                first_step=first_step,
                snapshots=half,
                log_drift=log_relative(layer.to_oldest[half - 1], layer.norm),
                log_lr=math.log(half_spent) if half_spent > 0 else None,
                first=_thin(weights[0]) if memory is None else memory.first,
            )
        span = min(memory.snapshots, layer.snapshots)
        drift = log_relative(layer.to_newest[layer.snapshots - span], layer.norm)
        spent = lr[-1] - lr[-span]
        memory.last_log_ratio = 0.0
        if memory.log_lr is not None:
            # Without learning rate nothing moves and there is nothing to divide by: the drift alone counts.
            log_spent = math.log(spent) if spent > 0 else memory.log_lr
            memory.last_log_ratio = clamp((drift - log_spent) - (memory.log_drift - memory.log_lr), -RATIO_LIMIT, RATIO_LIMIT)
        memory.last_log_drift = layer.log_drift
        memory.last_log_future = clamp(layer.log_drift + _growth(layer) * log_remaining, LOG_FLOOR, LOG_CAP)
        memory.last_log_share = clamp(memory.last_log_future - _log_displacement(memory.first, weights[-1]), LOG_FLOOR, LOG_CAP)
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
    steps: list[int]  # (n,)
    lr_spent: list[float]  # (n,)


def _thin(weights: Tensor) -> list[float]:
    """Return at most _REMEMBERED of the weights (sample_size,), evenly spaced."""
    return weights[:: -(-len(weights) // _REMEMBERED)].tolist()


def _log_displacement(first: list[float], newest: Tensor) -> float:
    """Return the log of the newest snapshot's relative distance from the remembered one; 0 for another sample size.

    Args:
        first: The remembered weights.
        newest: (sample_size,).
    """
    now = newest[:: -(-len(newest) // _REMEMBERED)].float()
    if len(now) != len(first):
        return 0.0
    return log_relative(float(torch.linalg.vector_norm(now - torch.tensor(first))), float(torch.linalg.vector_norm(now)))


def _growth(layer: _Measured) -> float:
    """Return the exponent by which the distance from the newest snapshot grew with learning rate, in the older half of the window."""
    lr = layer.lr_spent if layer.lr_spent[-1] > layer.lr_spent[0] else [float(step) for step in layer.steps]
    half = min(bisect_left(lr, (lr[0] + lr[-1]) / 2), layer.snapshots - 2)
    whole, later = layer.to_newest[0], layer.to_newest[half]
    if half == 0 or whole <= 0.0 or later <= 0.0 or lr[half] >= lr[-1]:
        return 0.5
    span = math.log((lr[-1] - lr[0]) / (lr[-1] - lr[half]))
    return clamp(math.log(whole / later) / span, *_GROWTH) if span > 0 else 0.5


def _tokens(statistics: WindowStatistics, windows: Sequence[Window]) -> Tensor:
    """Compute the token features: (layers, n, len(TOKEN_FEATURES)) fp32."""
    steps = torch.stack([window.steps for window in windows]).double()
    lr = torch.stack([window.lr_spent for window in windows]).double()
    age = (steps[:, -1:] - steps) / (steps[:, -1:] - steps[:, :1])
    lr_span = lr[:, -1:] - lr[:, :1]
    lr_share = torch.where(lr_span > 0, (lr[:, -1:] - lr) / lr_span.clamp_min(1e-300), age)
    largest = statistics.to_newest.amax(1, keepdim=True)
    log_step = log_to_mean(statistics.step)
    log_lr = log_to_mean(lr.diff(dim=1).float())
    nothing = torch.zeros_like(log_step[:, :1])
    columns = [
        age.float(),
        lr_share.float(),
        ratio(statistics.to_newest, largest),
        ratio(statistics.to_oldest, largest),
        torch.cat([log_step[:, :1], log_step], 1),  # the oldest snapshot has no update into it and takes its neighbour's
        torch.cat([(log_step - log_lr)[:, :1], log_step - log_lr], 1),
        torch.cat([nothing, statistics.cosine, nothing], 1),
    ]
    return torch.stack(columns, dim=2)


def _log_remaining(view: View, layer: _Measured) -> float | None:
    """Return log(remaining learning rates / learning rates in the window), clamped; None if unknown."""
    spent = layer.lr_spent[-1] - layer.lr_spent[0]
    remaining = view.lr_remaining
    if remaining is None:
        if view.total_steps is None:
            return None
        # The length is known but the schedule is not: assume a constant learning rate. For a decay this is too high,
        # which is the cautious side.
        remaining = spent * max(0, view.total_steps - view.step) / (layer.steps[-1] - layer.steps[0])
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
