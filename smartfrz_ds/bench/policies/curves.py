"""Statistics of the runs of `smartfrz bench policies`: curves over the saved FLOPs, and differences to full training and to other curves.

Every difference is between two runs with the same task and seed, hence the same initial weights and batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import NamedTuple

from .files import FULL, ONE


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run.

    Attributes:
        entry: Name of the entry in the policies file, or "full", "matched", "matched-time".
        label: "one", or the label of the setting in the curve; of a matched run its number of steps.
        run: Name of the result.
        layers, frozen: Number of layers, and of frozen ones at the end.
        first_freeze: Step of the first freeze; None where there was none.
        metric, loss: On held-out data.
        flops, full_flops: Training FLOPs, forward and backward, actual and with nothing frozen.
        saved: Fraction of the FLOPs that was saved.
        use: "design" or "once", as in the task file.
        pretrained: Whether the task starts from trained weights.
        matched_steps, matched_time_steps: Length of full training at the FLOPs, and at the wall time, of this freezing run; None for other
            runs, and where the time was not measured.
    """

    task: str
    entry: str
    label: str
    seed: int
    steps: int
    run: str
    layers: int
    frozen: int
    first_freeze: int | None
    metric: float
    loss: float
    flops: float
    full_flops: float
    saved: float
    seconds: float
    cpu_seconds: float
    total_seconds: float
    warnings: tuple[str, ...] = ()
    use: str = "design"
    pretrained: bool = False
    matched_steps: int | None = None
    matched_time_steps: int | None = None


class Stat(NamedTuple):
    """Mean (NaN without values), standard error (NaN with fewer than two) and number of values."""

    mean: float
    error: float
    n: int


class Point(NamedTuple):
    """A run on a curve."""

    saved: float
    metric: float
    loss: float


def stat(values: Iterable[float]) -> Stat:
    """Compute mean and standard error of independent values."""
    seen = list(values)
    if not seen:
        return Stat(math.nan, math.nan, 0)
    return Stat(mean(seen), stdev(seen) / math.sqrt(len(seen)) if len(seen) > 1 else math.nan, len(seen))


def over_tasks(stats: Iterable[Stat]) -> Stat:
    """Compute the mean over tasks with equal weights. Tasks without a value are left out; n counts tasks."""
    seen = [s for s in stats if s.n]
    if not seen:
        return Stat(math.nan, math.nan, 0)
    return Stat(mean(s.mean for s in seen), math.sqrt(sum(s.error**2 for s in seen)) / len(seen), len(seen))


def curve(rows: Sequence[Row], task: str, entry: str, seed: int) -> list[Point]:
    """Return the points of an entry's curve with one seed, from full training (nothing saved) upwards.

    Runs with the same saving are averaged. Empty where full training or the curve has no run.
    """
    mine = [r for r in rows if r.task == task and r.seed == seed and r.entry in (FULL, entry)]
    full = [r for r in mine if r.entry == FULL]
    swept = [r for r in mine if r.entry == entry and r.label != ONE]
    if not full or not swept:
        return []
    at: dict[float, list[Row]] = {0.0: full}
    for r in swept:
        if r.saved > 0:  # otherwise it equals full training
            at.setdefault(r.saved, []).append(r)
    return [Point(saved, mean(r.metric for r in same), mean(r.loss for r in same)) for saved, same in sorted(at.items())]


def interpolate(points: Sequence[Point], saved: float) -> Point | None:
    """Interpolate a curve linearly at this saving; None beyond its last point."""
    for left, right in pairwise(points):
        if left.saved <= saved <= right.saved:
            t = (saved - left.saved) / (right.saved - left.saved)
            return Point(saved, left.metric + t * (right.metric - left.metric), left.loss + t * (right.loss - left.loss))
    return points[0] if points and saved == points[0].saved else None


def against_full(rows: Sequence[Row], chosen: Iterable[Row]) -> tuple[Stat, Stat]:
    """Differences of metric and loss to full training with the same task and seed."""
    full = {(r.task, r.seed): r for r in rows if r.entry == FULL}
    pairs = [(r, full[r.task, r.seed]) for r in chosen if (r.task, r.seed) in full]
    return stat(r.metric - f.metric for r, f in pairs), stat(r.loss - f.loss for r, f in pairs)


def against_curve(rows: Sequence[Row], chosen: Iterable[Row], baseline: str) -> tuple[Stat, Stat]:
    """Differences of metric and loss to the baseline's curve with the same task and seed, at the same saved FLOPs.

    Runs that save more than the curve's last point are left out.
    """
    pairs = [(r, interpolate(curve(rows, r.task, baseline, r.seed), r.saved)) for r in chosen]
    found = [(r, p) for r, p in pairs if p is not None]
    return stat(r.metric - p.metric for r, p in found), stat(r.loss - p.loss for r, p in found)


def curve_at(rows: Sequence[Row], task: str, entry: str, saved: float) -> tuple[Stat, Stat]:
    """Differences of metric and loss between an entry's curve at this saving and full training, over the seeds that reach it."""
    found = []
    for seed in sorted({r.seed for r in rows if r.task == task and r.entry == entry}):
        points = curve(rows, task, entry, seed)
        here = interpolate(points, saved)
        if here is not None:
            found.append((here, points[0]))
    return stat(p.metric - f.metric for p, f in found), stat(p.loss - f.loss for p, f in found)
