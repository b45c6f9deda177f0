"""Whether the ranks of a pipeline with a frozen front are better used as fewer stages with more replicas (PipeTransformer, He et al., ICML
2021, arXiv 2102.03161: elastic pipelining).

Fewer stages idle less while the pipeline fills and drains; they hold more layers each. Frozen layers have no gradient, no optimizer state
and keep no activations, so that what needed four ranks may fit two. Nothing is changed here: `smartfrz reshape` writes the checkpoint.
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
    """stages x replicas with these bounds. micro_batches: of a step and replica, so that the global batch stays. seconds: of a step;
    seconds_now: of a step as it is."""

    stages: int
    replicas: int
    micro_batches: int
    parts: tuple[int, ...]
    seconds: float
    seconds_now: float

    @property
    def gain(self) -> float:
        """How many times faster a step is."""
        return self.seconds_now / self.seconds

    def advice(self, checkpoint: str) -> str:
        """One line for a report. checkpoint: the folder that save_checkpoint gets."""
        bounds, several = ",".join(map(str, self.parts)), "s" if self.stages > 1 else ""
        return (
            f"the active part fits {self.stages} stage{several}: {self.stages} x {self.replicas} (stages x replicas) would take "
            f"{self.seconds:.3g} s a step instead of {self.seconds_now:.3g} s (x{self.gain:.2f}). Save, run `smartfrz reshape {checkpoint} "
            f"--pp {self.stages} --dp {self.replicas} --bounds {bounds}`, and resume with num_stages={self.stages} and "
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
    """The fastest way to use the same ranks as fewer stages and more replicas; None where none is `min_gain` times faster than now.

    costs: as measured with `replicas` replicas and their micro-batch, which stays as large. weights and activation_bytes tell what fits.
    stages, replicas, micro_batches (of a step and replica): of now, >= 1.
    frozen: layers at the front that are frozen.
    current: bounds now; None: the best cut of now. start: bounds when nothing was frozen; None: the best cut of then.
    cluster: links, ZeRO stage and bytes a weight, as in `simulate`; its `replicas` is ignored. Without it communication is free and more
        replicas look better than they are.
    memory_limit: bytes of a rank. None: what the fullest rank held at the start, with nothing frozen.
    min_gain: > 0.
    Pure: equal arguments give the same, on every rank. ValueError names the argument, as `best_cut` and `simulate`.
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
        # A replica updates its share of the optimizer state (ZeRO).
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
    """Bytes of the rank that holds most with nothing frozen."""
    memory, stages = cluster.memory(costs, 0), len(parts) - 1
    held = [micro_batches if schedule == "gpipe" else min(stages - s, micro_batches) for s in range(stages)]
    return max(sum(memory[i] + held[s] * costs[i].activation_bytes for i in range(a, b)) for s, (a, b) in enumerate(pairwise(parts)))
