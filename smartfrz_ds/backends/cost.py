"""Predicts the pause of a freeze and the bytes that it moves.

The bytes are exact: they are computed from the flat layouts before and after the freeze. The time is those bytes over measured bandwidths,
plus a latency for each exchange. docs/cost-of-a-freeze.md does the same arithmetic for a large model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import Parameter

from smartfrz_ds.distributed.devices import synchronize

from .base import Backend

_PROBE_BYTES = 4 * 2**20
# Exchanges of a few bytes in which the ranks agree before and after (distributed/collectives.py).
_AGREEMENTS = 3


@dataclass(frozen=True, kw_only=True)
class Bandwidths:
    """Measured bandwidths of the cluster.

    Attributes:
        network: Bytes/s that one rank sends, and receives at the same time, in an all-to-all of the data-parallel ranks.
        memory: Bytes/s of a copy into new memory on the device of the weights.
        host_link: Bytes/s between the device and the host; infinite if both are the same memory.
        latency: Seconds of the smallest exchange.
    """

    network: float
    memory: float
    host_link: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The bytes of a freeze or thaw.

    Attributes:
        moved_bytes: Bytes sent between ranks, over all ranks.
        busiest_bytes: Bytes that the busiest rank sends or receives, summed over the exchanges. They determine the time.
        least_busiest_bytes: The same if all exchanges ran at once: a lower bound for any order of them.
        exchanges: Number of consecutive all-to-all exchanges.
        copied_bytes: Bytes copied into new memory.
        linked_bytes: Bytes copied between device and host.
    """

    moved_bytes: int = 0
    busiest_bytes: int = 0
    least_busiest_bytes: int = 0
    exchanges: int = 0
    copied_bytes: int = 0
    linked_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def seconds(self, speed: Bandwidths) -> float:
        """Return the pause in seconds."""
        moving = self.busiest_bytes / speed.network + (self.exchanges + _AGREEMENTS) * speed.latency
        return moving + self.copied_bytes / speed.memory + self.linked_bytes / speed.host_link


@dataclass(frozen=True, kw_only=True)
class PausePrediction:
    """A predicted pause.

    Attributes:
        seconds: The pause in seconds.
        moved_bytes: Bytes sent between ranks, over all ranks.
        cost: All bytes.
    """

    seconds: float
    moved_bytes: int
    cost: Cost

    def __str__(self) -> str:
        return f"predicted pause {self.seconds:.3g} s, {self.moved_bytes / 1e6:.1f} MB move between ranks"


def predict_pause(backend: Backend, out: Collection[Parameter], speed: Bandwidths, *, keep: bool = False) -> PausePrediction:
    """Predict the pause of a freeze or thaw. Changes nothing and communicates nothing; the same on every rank.

    Args:
        backend: The engine's backend.
        out: All parameters that are outside of the optimizer afterwards.
        speed: Measured bandwidths.
        keep: Whether the released state is kept on the host (`keep_state`).
    """
    cost = backend.change_cost(set(out), keep=keep)
    return PausePrediction(seconds=cost.seconds(speed), moved_bytes=cost.moved_bytes, cost=cost)


def measure_bandwidths(device: torch.device) -> Bandwidths:
    """Measure the bandwidths with a few megabytes, in some milliseconds. Collective; every rank returns rank 0's values.

    Args:
        device: The device of the engine's parameters.
    """
    probe = torch.ones(_PROBE_BYTES, dtype=torch.uint8, device=device)
    memory = _PROBE_BYTES / _best_of(lambda: probe.clone(), device)
    link, network, latency = math.inf, math.inf, 0.0
    if device.type != "cpu":
        link = _PROBE_BYTES / _best_of(lambda: probe.cpu(), device)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        size = _PROBE_BYTES // world * world
        send, receive = torch.ones(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
        small = torch.ones(world, dtype=torch.uint8, device=device)
        out = torch.empty_like(small)
        latency = _best_of(lambda: dist.all_to_all_single(out, small), device)
        network = size * (world - 1) / world / max(1e-9, _best_of(lambda: dist.all_to_all_single(receive, send), device) - latency)
        told = torch.tensor([network, memory, link, latency], dtype=torch.float64, device=device)
        dist.broadcast(told, src=0)
        network, memory, link, latency = told.tolist()
    return Bandwidths(network=network, memory=memory, host_link=link, latency=latency)


def _best_of(action: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Return the seconds of the fastest of a few calls, after a warm-up call."""
    fastest = math.inf
    for turn in range(times + 1):
        began = time.perf_counter()
        action()
        synchronize(device)
        if turn:
            fastest = min(fastest, time.perf_counter() - began)
    return fastest
