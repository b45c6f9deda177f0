"""Whether the ranks of a pipeline with a frozen front are better used as fewer stages with more replicas.

Fewer stages idle less while the pipeline fills and drains, but hold more layers each. Frozen layers have no gradient,
no optimizer state and no stored activations, so that two ranks may suffice for what needed four. This module changes
nothing: `smartfrz reshape` writes the checkpoint.

Source: PipeTransformer (He et al., ICML 2021, arXiv 2102.03161), elastic pipelining.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .costs import Cluster, LayerCost
from .cut import DoesNotFit, best_cut
from .simulate import Schedule, simulate


@dataclass(frozen=True, kw_only=True)
class Width:
    """A topology of stages x replicas.

    Attributes:
        stages: Number of stages.
        replicas: Number of replicas.
        micro_batches: Micro-batches per step and replica, with the same global batch.
        parts: Bounds of the stages.
        seconds: Seconds of a step.
        seconds_now: Seconds of a step with the current topology.
    """

    stages: int
    replicas: int
    micro_batches: int
    parts: tuple[int, ...]
    seconds: float
    seconds_now: float

    @property
    def gain(self) -> float:
        """Speed-up of a step over the current topology."""
        return self.seconds_now / self.seconds

    def advice(self, checkpoint: str) -> str:
        """Return one line for a report. `checkpoint` is the folder passed to save_checkpoint."""
        bounds, several = ",".join(map(str, self.parts)), "s" if self.stages > 1 else ""
        return (
            f"the active part fits {self.stages} stage{several}: {self.stages} x {self.replicas} (stages x replicas) would take "
            f"{self.seconds:.3g} s per step instead of {self.seconds_now:.3g} s (x{self.gain:.2f}). Save, run `smartfrz reshape "
            f"{checkpoint} --pp {self.stages} --dp {self.replicas} --bounds {bounds}`, and resume with num_stages={self.stages} and "
            f"gradient_accumulation_steps={self.micro_batches}"
        )


def better_width(
    costs: Sequence[LayerCost],
    stages: int,
    replicas: int,
    micro_batches: int,
    frozen: int = 0,
    *,
    current: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
    cluster: Cluster | None = None,
    memory_limit: float | None = None,
    min_gain: float = 1.05,
    schedule: Schedule = "1f1b",
) -> Width | None:
    """Find the fastest way to use the same ranks as fewer stages and more replicas.

    A pure function: equal arguments give the same result on every rank.

    Args:
        costs: Costs as measured with `replicas` replicas and their micro-batch, whose size stays. `weights` and
            `activation_bytes` determine what fits.
        stages: Current number of stages, >= 1.
        replicas: Current number of replicas, >= 1.
        micro_batches: Current micro-batches per step and replica, >= 1.
        frozen: Number of frozen front layers.
        current: Current bounds; None: the best cut.
        start: Bounds when nothing was frozen; None: the best cut with nothing frozen.
        cluster: Links, ZeRO stage and bytes per weight, as in `simulate`; its `replicas` is ignored. Without it
            communication is free, and more replicas look better than they are.
        memory_limit: Bytes of a rank; None: the bytes of the fullest rank with nothing frozen.
        min_gain: Required speed-up, > 0.
        schedule: "1f1b" or "gpipe".

    Returns:
        None if no topology is `min_gain` times faster than the current one.

    Raises:
        ValueError: Names the argument, as in `best_cut` and `simulate`.
    """
    for name, value in (("stages", stages), ("replicas", replicas), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{name}: got {value!r}; allowed: an integer >= 1")
    if not min_gain > 0:
        raise ValueError(f"min_gain: got {min_gain!r}; allowed: a number > 0")
    links, activations = replace(cluster or Cluster(), replicas=replicas), [c.activation_bytes for c in costs]
    now = list(current) if current is not None else best_cut(costs, stages, micro_batches, frozen, schedule=schedule, cluster=links)
    seconds_now = simulate(costs, now, micro_batches, frozen, schedule=schedule, cluster=links).makespan
    if memory_limit is None:
        begun = list(start) if start is not None else best_cut(costs, stages, micro_batches, schedule=schedule, cluster=links)
        memory_limit = _fullest(costs, begun, micro_batches, links, schedule)
    best: Width | None = None
    for fewer in range(min(stages, len(costs)) - 1, 0, -1):
        more, left = divmod(stages * replicas, fewer)
        micro, odd = divmod(micro_batches * replicas, more)
        if left or odd:
            continue
        wider = replace(links, replicas=more)
        # Under ZeRO, each replica updates its share of the optimizer state.
        scaled = [replace(c, optimizer=c.optimizer * replicas / more) for c in costs] if wider.zero else list(costs)
        try:
            parts = best_cut(
                scaled,
                fewer,
                micro,
                frozen,
                wider.memory(costs, frozen),
                memory_limit,
                activations_per_layer=activations,
                schedule=schedule,
                cluster=wider,
            )
        except DoesNotFit:
            continue
        seconds = simulate(scaled, parts, micro, frozen, schedule=schedule, cluster=wider).makespan
        if seconds * min_gain <= seconds_now and (best is None or seconds < best.seconds):
            best = Width(stages=fewer, replicas=more, micro_batches=micro, parts=tuple(parts), seconds=seconds, seconds_now=seconds_now)
    return best


def _fullest(costs: Sequence[LayerCost], parts: Sequence[int], micro_batches: int, cluster: Cluster, schedule: Schedule) -> float:
    """Return the bytes of the fullest rank with nothing frozen."""
    memory, stages = cluster.memory(costs, 0), len(parts) - 1
    held = [micro_batches if schedule == "gpipe" else min(stages - s, micro_batches) for s in range(stages)]
    return max(sum(memory[i] + held[s] * costs[i].activation_bytes for i in range(a, b)) for s, (a, b) in enumerate(pairwise(parts)))
