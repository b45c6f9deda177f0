"""Saving of a freeze plan on a cluster: expected step time, traffic and hours, with and without rebalancing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .cached import CachedPhase, CacheUse, cached_phase
from .costs import Cluster, LayerCost
from .cut import best_cut
from .memory import Memory, rank_memory
from .simulate import Schedule, Timeline, check_parts, simulate


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run.

    Attributes:
        share: Share of the run's steps, in (0, 1].
        frozen: Number of frozen front layers.
    """

    share: float
    frozen: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step with one cut.

    Attributes:
        parts: The bounds of the stages.
        seconds: Seconds of the step.
        idle: Share of the stages' time without computation, in [0, 1].
        replica_bytes: Bytes that a rank sends to the other replicas of its stage, in the stage that sends most.
        stage_bytes: Bytes sent between stages, over all of one pipeline.
        memory: Memory of a rank of the fullest stage.
    """

    parts: tuple[int, ...]
    seconds: float
    idle: float
    replica_bytes: float
    stage_bytes: int
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """The prediction for one phase.

    Attributes:
        share: Share of the run's steps, in (0, 1].
        frozen: Number of frozen front layers.
        pruned: A step with the cut at the start of the run.
        rebalanced: A step with the best cut for this phase (the same with a single stage).
        cached: A step with the prefix cache; None where it was not asked for.
    """

    share: float
    frozen: int
    pruned: Step
    rebalanced: Step
    cached: CachedPhase | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The prediction for a run.

    Attributes:
        unfrozen: A step with nothing frozen.
        phases: The phases, in order.
        steps: Steps of the run.
        ranks: Ranks of the cluster.
    """

    unfrozen: Step
    phases: tuple[PhasePlan, ...]
    steps: int
    ranks: int

    @property
    def hours(self) -> dict[str, float]:
        """Hours of the run: never frozen, pruned, rebalanced, and cached if that was asked for."""
        share = {
            "unfrozen": sum(p.share * self.unfrozen.seconds for p in self.phases),
            "pruned": sum(p.share * p.pruned.seconds for p in self.phases),
            "rebalanced": sum(p.share * p.rebalanced.seconds for p in self.phases),
        }
        if self.phases and all(p.cached is not None for p in self.phases):
            share["cached"] = sum(p.share * p.cached.seconds for p in self.phases if p.cached is not None)
        return {name: self.steps * seconds / 3600 for name, seconds in share.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able data, in seconds, bytes and hours."""
        return asdict(self) | {"hours": self.hours}


def freeze_plan(
    costs: Sequence[LayerCost],
    phases: Sequence[Phase],
    *,
    stages: int = 1,
    micro_batches: int = 1,
    cluster: Cluster | None = None,
    steps: int = 1,
    parts: Sequence[int] | None = None,
    schedule: Schedule = "1f1b",
    memory_limit: float | None = None,
    cache: CacheUse | None = None,
) -> Plan:
    """Predict the cost of each phase of a run.

    Args:
        costs: Costs of the layers, front to back.
        phases: The phases. Their shares add up to 1 for a run; a list of cases to compare may have any shares.
        stages: Number of stages.
        micro_batches: Micro-batches per step.
        cluster: The cluster; None: one replica and free communication.
        steps: Steps of the run, >= 1.
        parts: The cut at the start of the run; None: the best one with nothing frozen, so that no saving is due to a
            bad start.
        schedule: "1f1b" or "gpipe".
        memory_limit: Bytes of a rank (weights, gradients, optimizer state, activations), for rebalanced cuts and the
            default first cut; None: no limit.
        cache: The use of the prefix cache; None: it is off. Only with a single stage.

    Raises:
        ValueError: Names the argument.
    """
    cluster = cluster or Cluster()
    if cache is not None and stages > 1:
        raise ValueError(f"cache: got one with {stages} stages; allowed in a pipeline: None, it has no prefix cache yet")
    if steps < 1:
        raise ValueError(f"steps: got {steps!r}; allowed: an integer >= 1")
    for phase in phases:
        if not 0 < phase.share <= 1:
            raise ValueError(f"share: got {phase.share!r}; allowed: more than 0, at most 1")

    def cut(frozen: int, current: Sequence[int] | None) -> list[int]:
        return best_cut(
            costs,
            stages,
            micro_batches,
            frozen,
            cluster.memory(costs, frozen),
            memory_limit,
            activations_per_layer=[c.activation_bytes for c in costs],
            current=current,
            schedule=schedule,
            cluster=cluster,
        )

    def step(bounds: Sequence[int], frozen: int) -> Step:
        time = simulate(costs, bounds, micro_batches, frozen, schedule=schedule, cluster=cluster)
        ranks = rank_memory(costs, bounds, micro_batches, frozen, cluster=cluster, schedule=schedule)
        return _step(costs, bounds, micro_batches, frozen, cluster, time, max(ranks, key=lambda m: m.total))

    first = list(parts) if parts is not None else cut(0, None)
    check_parts(first, len(costs))
    if len(first) != stages + 1:
        raise ValueError(f"parts: got {first!r}; allowed: {stages + 1} bounds for {stages} stages")
    planned, bounds = [], first
    for phase in phases:
        bounds = cut(phase.frozen, bounds)
        cached = None
        if cache is not None:
            cached = cached_phase(costs, phase.frozen, phase.share, cache, micro_batches=micro_batches, cluster=cluster)
        pruned, rebalanced = step(first, phase.frozen), step(bounds, phase.frozen)
        planned.append(PhasePlan(share=phase.share, frozen=phase.frozen, pruned=pruned, rebalanced=rebalanced, cached=cached))
    return Plan(unfrozen=step(first, 0), phases=tuple(planned), steps=steps, ranks=stages * cluster.replicas)


def _step(
    costs: Sequence[LayerCost], parts: Sequence[int], micro_batches: int, frozen: int, cluster: Cluster, time: Timeline, memory: Memory
) -> Step:
    busiest, between = 0.0, 0
    for a, b in itertools.pairwise(parts):
        still = max(a, min(b, frozen))
        held = [c.weights for c in costs[a:b]]
        traffic = cluster.traffic(sum(held[still - a :]), sum(held[: still - a]), micro_batches)
        busiest = max(busiest, traffic.total)
        if b < len(costs):
            # the gradient crosses a bound only if something in front of it trains
            between += costs[b - 1].output_bytes * micro_batches * (2 if b > frozen else 1)
    return Step(parts=tuple(parts), seconds=time.makespan, idle=time.idle, replica_bytes=busiest, stage_bytes=between, memory=memory)
