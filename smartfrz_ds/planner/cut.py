"""Cut a chain of layers into pipeline stages so that a step is as short as possible.

A layer takes the same time per micro-batch wherever it is (its forward, and what remains of its backward with a
frozen front). A cut that minimizes the slowest stage is therefore close to the best: once the pipeline is full, a
step takes the slowest stage's time per micro-batch. The cost of filling and draining is simulated: for all cuts if
there are few, otherwise for some good ones and then for their neighbours. Integer arithmetic gives every rank the
same result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from .costs import Cluster, LayerCost, check_frozen, layer_backward
from .simulate import Schedule, check_parts, check_schedule, prefix_sums, stage_times, ticks, timeline

_ALL_CUTS = 3000  # up to this number, all cuts are simulated
_WORK = 4_000_000  # limit on the simulated forwards and backwards after that: a few seconds
# By how many percent the slowest stage may exceed its minimum in the cuts to start from.
_SLACK = (0, 2, 5, 10, 20, 40)


class DoesNotFit(ValueError):
    """No cut keeps every stage within its memory limit."""


def best_cut(
    costs: Sequence[LayerCost],
    stages: int,
    micro_batches: int,
    frozen: int = 0,
    memory_per_layer: Sequence[float] | None = None,
    memory_limit: float | Sequence[float] | None = None,
    *,
    activations_per_layer: Sequence[float] | None = None,
    current: Sequence[int] | None = None,
    pinned: tuple[int, int] | None = None,
    schedule: Schedule = "1f1b",
    cluster: Cluster | None = None,
) -> list[int]:
    """Find the bounds (as PipelineModule.parts) of the fastest step while the first `frozen` layers are frozen.

    A pure function: equal arguments give the same cut on every rank. Among equally good cuts it returns the first in
    the order of their bounds.

    Args:
        costs: Costs of the layers, front to back.
        stages: Number of stages, from 1 to the number of layers.
        micro_batches: Micro-batches per step, >= 1.
        frozen: Number of frozen front layers.
        memory_per_layer: Bytes of a layer on its rank in any stage (weights, gradients, optimizer state), with
            `frozen` frozen.
        memory_limit: Bytes of a rank, one number or one per stage; None: no limit.
        activations_per_layer: Bytes that a layer keeps for its backward per micro-batch (0 for a frozen one); a stage
            holds as many micro-batches as its schedule has in flight.
        current: The current bounds. Of equally fast cuts the one that moves the fewest layers is returned, and never
            one slower than `current` unless `current` exceeds the limit.
        pinned: (front, rear): layers up to `front` stay on the first stage, layers from `rear` on stay on the last.
        schedule: "1f1b" or "gpipe".
        cluster: Links and replicas, as in `simulate`.

    Returns:
        stages + 1 bounds from 0 to the number of layers.

    Raises:
        DoesNotFit: No cut satisfies the limit.
        ValueError: Names the argument and what is allowed.
    """
    check_schedule(schedule)
    check_frozen(costs, frozen)
    if not 1 <= stages <= len(costs):
        raise ValueError(f"stages: got {stages!r}; allowed: an integer from 1 to {len(costs)}, so that each stage has a layer")
    room = _Room(len(costs), stages, micro_batches, frozen, memory_per_layer, activations_per_layer, memory_limit, schedule)
    search = _Search(costs, stages, micro_batches, frozen, schedule, cluster or Cluster(), room, current, pinned)
    if current is not None:
        check_parts(current, len(costs))
        if len(current) != stages + 1:
            raise ValueError(f"current: got {list(current)!r}; allowed: {stages + 1} bounds for {stages} stages")
        if room.fits(current):
            search.consider(tuple(current))
    if math.comb(len(costs) - 1, stages - 1) <= _ALL_CUTS:
        search.all_cuts()
    else:
        search.some_cuts()
    if search.best is None:
        raise DoesNotFit(f"memory_limit: got {memory_limit!r}; no cut of {len(costs)} layers into {stages} stages fits")
    return list(search.best[-1])


def micro_batches_held(stages: int, micro_batches: int, schedule: Schedule) -> list[int]:
    """Return how many micro-batches' activations each stage keeps at once."""
    return [micro_batches if schedule == "gpipe" else min(stages - s, micro_batches) for s in range(stages)]


class _Room:
    """The memory limits of the stages."""

    def __init__(
        self,
        layers: int,
        stages: int,
        micro_batches: int,
        frozen: int,
        memory: Sequence[float] | None,
        activations: Sequence[float] | None,
        limit: float | Sequence[float] | None,
        schedule: Schedule,
    ) -> None:
        for name, values, count in (("memory_per_layer", memory, layers), ("activations_per_layer", activations, layers)):
            if values is not None and (len(values) != count or any(not 0 <= v < math.inf for v in values)):
                raise ValueError(f"{name}: got {list(values)!r}; allowed: {count} finite numbers >= 0")
        limits = [limit] * stages if isinstance(limit, int | float) else list(limit) if limit is not None else [math.inf] * stages
        if len(limits) != stages or any(not v >= 0 for v in limits):
            raise ValueError(f"memory_limit: got {limit!r}; allowed: one number >= 0, or one for each of {stages} stages")
        self.limited = limit is not None and (memory is not None or activations is not None)
        # Whole bytes, so that sums do not depend on the order.
        self._limits = limits
        self._memory = prefix_sums([math.ceil(v) for v in memory or [0] * layers])
        self._activations = prefix_sums([0 if i < frozen else math.ceil(v) for i, v in enumerate(activations or [0] * layers)])
        self._held = micro_batches_held(stages, micro_batches, schedule)

    def holds(self, stage: int, first: int, end: int) -> bool:
        """Return whether layers first … end - 1 fit on a stage."""
        kept = self._held[stage] * (self._activations[end] - self._activations[first])
        return self._memory[end] - self._memory[first] + kept <= self._limits[stage]

    def fits(self, parts: Sequence[int]) -> bool:
        return not self.limited or all(self.holds(s, parts[s], parts[s + 1]) for s in range(len(parts) - 1))


@dataclass
class _Search:
    """The best cut so far, and strategies to find better ones."""

    costs: Sequence[LayerCost]
    stages: int
    micro_batches: int
    frozen: int
    schedule: Schedule
    cluster: Cluster
    room: _Room
    current: Sequence[int] | None
    pinned: tuple[int, int] | None

    def __post_init__(self) -> None:
        backward = layer_backward(self.costs, self.frozen)
        self.forward = prefix_sums([ticks(c.forward) for c in self.costs])
        self.backward = prefix_sums([ticks(b) for b in backward])
        self.load = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        self.best: tuple[int, int, tuple[int, ...]] | None = None  # ticks of a step, number of layers that move, bounds
        self.seen: set[tuple[int, ...]] = set()
        self.work = 0

    def at_least(self, parts: Sequence[int]) -> int:
        """Return a lower bound on a step's ticks: a stage's computation, between the forwards in front of it and the backwards after it."""
        return max(self.load[a] + self.micro_batches * (self.load[b] - self.load[a]) for a, b in pairwise(parts))

    def moved(self, parts: Sequence[int]) -> int:
        """Return the number of layers that change their stage."""
        if self.current is None:
            return 0
        stay = sum(max(0, min(self.current[s + 1], parts[s + 1]) - max(self.current[s], parts[s])) for s in range(self.stages))
        return len(self.costs) - stay

    def consider(self, parts: tuple[int, ...]) -> None:
        """Simulate a cut that fits, unless it cannot be better."""
        if parts in self.seen or (self.pinned is not None and not (parts[1] > self.pinned[0] and parts[-2] <= self.pinned[1])):
            return
        self.seen.add(parts)
        if self.best is not None and self.at_least(parts) > self.best[0]:
            return
        times = stage_times(self.costs, parts, self.micro_batches, self.frozen, self.cluster)
        self.work += 2 * self.stages * min(self.micro_batches + self.stages, 6 * self.stages)
        took = ticks(timeline(times, self.micro_batches, self.schedule, self.cluster, parts, self.frozen).makespan)
        found = (took, self.moved(parts), parts)
        if self.best is None or found < self.best:
            self.best = found

    def all_cuts(self) -> None:
        layers = len(self.costs)
        cuts = [(0, *inner, layers) for inner in combinations(range(1, layers), self.stages - 1)]
        for parts in sorted((p for p in cuts if self.room.fits(p)), key=lambda p: (self.at_least(p), p)):
            self.consider(parts)

    def some_cuts(self) -> None:
        least = self._least_load()
        if least is None:
            return
        for slack in _SLACK:
            for parts in self._packed(least + least * slack // 100):
                self.consider(parts)
            if self.work >= _WORK:
                break
        # Hill climbing: move the best bound by one layer until no move helps.
        while self.best is not None and self.work < _WORK:
            start = self.best
            for parts in sorted(self._neighbours(start[-1]), key=lambda p: (self.at_least(p), p)):
                if self.work >= _WORK:
                    break
                self.consider(parts)
            if self.best == start:
                break

    def _neighbours(self, parts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for i in range(1, self.stages):
            for way in (-1, 1):
                bound = parts[i] + way
                if parts[i - 1] < bound < parts[i + 1]:
                    new = (*parts[:i], bound, *parts[i + 1 :])
                    if self.room.fits(new):
                        yield new

    def _least_load(self) -> int | None:
        """Return the minimum over all fitting cuts of the slowest stage's time per micro-batch; None if no cut fits."""
        low, high = -1, self.load[-1]
        if self._furthest(high) is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._furthest(middle) is None:
                low = middle
            else:
                high = middle
        return high

    def _may(self, stage: int, first: int, end: int, load: int) -> bool:
        return self.load[end] - self.load[first] <= load and (not self.room.limited or self.room.holds(stage, first, end))

    def _furthest(self, load: int) -> tuple[int, ...] | None:
        """Return the cut whose bounds are all as far back as possible if no stage computes more than `load`; None if there is none.

        Filling stage by stage is optimal: a stage that begins further back never ends further in front.
        """
        bounds, layers = [0], len(self.costs)
        for stage in range(self.stages):
            end, most = bounds[-1], layers - (self.stages - 1 - stage)
            while end < most and self._may(stage, bounds[-1], end + 1, load):
                end += 1
            if end == bounds[-1]:
                return None
            bounds.append(end)
        return tuple(bounds) if bounds[-1] == layers else None

    def _nearest(self, load: int) -> tuple[int, ...] | None:
        """Return the cut whose bounds are all as far in front as possible; None if there is none."""
        bounds = [len(self.costs)]
        for stage in reversed(range(self.stages)):
            first = bounds[-1]
            while first > stage and self._may(stage, first - 1, bounds[-1], load):
                first -= 1
            if first == bounds[-1]:
                return None
            bounds.append(first)
        return tuple(reversed(bounds)) if bounds[-1] == 0 else None

    def _packed(self, load: int) -> Iterator[tuple[int, ...]]:
        """Yield cuts in which no stage computes more than `load`: bounds far back, far in front, and close to even shares."""
        back, front = self._furthest(load), self._nearest(load)
        if back is None or front is None:
            return
        yield back
        yield front
        even, layers = [0], len(self.costs)
        for stage in range(self.stages - 1):
            share = self.load[-1] * (stage + 1) // self.stages
            last = even[-1]
            fitting = [
                end
                for end in range(max(last + 1, front[stage + 1]), min(back[stage + 1], layers - self.stages + 1 + stage) + 1)
                if self._may(stage, last, end, load)
            ]
            if not fitting:
                return
            even.append(min(fitting, key=lambda end: (abs(self.load[end] - share), end)))
        if self._may(self.stages - 1, even[-1], layers, load):
            yield (*even, layers)
