"""What the prefix cache saves in a phase of a run: steps whose rows are stored, the first epoch, and the space that rows need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .costs import Cluster, LayerCost
from .simulate import simulate

# Measured on one core: 8 rows of 98,304 bytes stored in 0.8 ms and read in 0.4 ms, 1 ms for keys (docs/prefix-cache.md).
READ, WRITE, KEYS = 2e9, 1e9, 1e-3


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """The use of the prefix cache in a run.

    Attributes:
        epochs: Passes over the data in the whole run, > 0.
        rows: Samples of the data, >= 1.
        batch: Samples of a micro-batch, >= 1.
        space: Bytes for rows on a host, memory and disk, > 0.
        hosts: Hosts, >= 1. With several, samples stay on their host (`HostSampler`).
        read: Bytes per second that a rank reads, > 0.
        write: Bytes per second that a rank writes, > 0.
        keys: Seconds for keys and the look at the prefix, per micro-batch.

    Raises:
        ValueError: A value is out of range.
    """

    epochs: float
    rows: int
    batch: int
    space: float
    hosts: int = 1
    read: float = READ
    write: float = WRITE
    keys: float = KEYS

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and (value > 0 or (name == "keys" and value == 0))):
                raise ValueError(f"{name}: got {value!r}; allowed: a finite number > 0")


@dataclass(frozen=True, kw_only=True)
class CachedPhase:
    """The prediction for one phase. Seconds of a step.

    Attributes:
        reason: Why the cache stays off; "" if it is used.
        row_bytes: Bytes of a stored row.
        need: Bytes of all rows on a host.
        hit_rate: Share of the micro-batches of a later epoch whose rows are all stored, in [0, 1].
        first: In the first epoch, in which rows are stored.
        hit: With all rows found.
        seconds: The mean over the phase; the step without the cache where it stays off.
    """

    reason: str
    row_bytes: float
    need: float
    hit_rate: float
    first: float
    hit: float
    seconds: float


def cached_phase(
    costs: Sequence[LayerCost],
    frozen: int,
    share: float,
    use: CacheUse,
    *,
    micro_batches: int = 1,
    cluster: Cluster | None = None,
    min_gain: float = 1.05,
) -> CachedPhase:
    """Predict the steps of one phase with the prefix cache. Without a pipeline.

    Args:
        costs: Costs of the layers, front to back. `output_bytes` of the last frozen layer is what is stored.
        frozen: Number of frozen front layers.
        share: Share of the run's steps, in (0, 1].
        use: The data and the space.
        micro_batches: Micro-batches per step.
        cluster: The cluster; None: one replica and free communication.
        min_gain: As `smartfrz.cache.min_gain`.
    """
    cluster = cluster or Cluster()

    def step(layers: Sequence[LayerCost]) -> float:
        return simulate(layers, [0, len(layers)], micro_batches, frozen, cluster=cluster).makespan

    plain = step(costs)
    stored = costs[frozen - 1].output_bytes if frozen else 0
    row, epochs = stored / use.batch, use.epochs * share
    need = row * math.ceil(use.rows / use.hosts)
    # a skipped layer takes no time, and ZeRO-3 does not gather its weights
    skipped = [replace(c, forward=0.0, weights=0) if i < frozen else c for i, c in enumerate(costs)]
    first = plain + micro_batches * (use.keys + stored / use.write)
    hit = step(skipped) + micro_batches * (use.keys + stored / use.read)
    fits = min(1.0, use.space / need) if need else 1.0
    rate = fits**use.batch
    reason = ""
    if not frozen:
        reason = "nothing is frozen"
    elif not stored:
        reason = f"the profile has no output_bytes of layer {frozen - 1}"
    elif epochs <= 1:
        reason = "no sample comes a second time with these layers frozen"
    elif plain < hit * min_gain:
        reason = f"a step would be faster by a factor of {plain / hit:.2f} only"
    elif plain < min_gain * (rate * hit + (1 - rate) * first):
        reason = f"only {fits:.0%} of the rows have room"
    later = rate * hit + (1 - rate) * first
    mean = (first + (epochs - 1) * later) / epochs if epochs > 1 else first
    return CachedPhase(
        reason=reason,
        row_bytes=row,
        need=need,
        hit_rate=rate if epochs > 1 else 0.0,
        first=first,
        hit=hit,
        seconds=plain if reason else mean,
    )
