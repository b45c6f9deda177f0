"""How long training will stand still for a freeze, and how many bytes it moves, before it happens.

The bytes are exact: they are read off the layouts that the freeze will lead from and to. The time is those bytes over measured bandwidths,
plus a latency for each exchange. The same arithmetic, on paper for a large model, is in docs/cost-of-a-freeze.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat import FlatBackend
from smartfrz_ds.backends.deepspeed.half import Bf16Backend
from smartfrz_ds.backends.deepspeed.partition import STAGING_BYTES, FlatLayout, Move, PackedLayout, _rounds, bytes_sent, plan_moves
from smartfrz_ds.backends.deepspeed.zero3 import Zero3Backend
from smartfrz_ds.distributed.devices import synchronize

from .base import Backend

_PROBE_BYTES = 4 * 2**20
# Exchanges of a few bytes with which the ranks agree before and after (agree.py).
_AGREEMENTS = 3


@dataclass(frozen=True, kw_only=True)
class Bandwidths:
    """What this cluster moves.

    network: bytes/s that one rank sends, and receives at the same time, in an all-to-all of the data-parallel ranks.
    memory: bytes/s of a copy into new memory, where the weights live.
    host_link: bytes/s between the device and the host; infinite where both are one memory.
    latency: seconds of the smallest exchange.
    """

    network: float
    memory: float
    host_link: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a change of the layout does, in bytes.

    moved_bytes: bytes that cross ranks, over all ranks.
    busiest_bytes: bytes that the busiest rank sends or receives, added up over the exchanges: what the time depends on.
    least_busiest_bytes: the same if all exchanges ran at once: no order of them can do with less.
    exchanges: number of all-to-all exchanges, one after the other.
    copied_bytes: bytes written into new memory, one after the other.
    linked_bytes: bytes that go from device to host or back, one after the other.
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
        """The pause that this costs, in seconds."""
        moving = self.busiest_bytes / speed.network + (self.exchanges + _AGREEMENTS) * speed.latency
        return moving + self.copied_bytes / speed.memory + self.linked_bytes / speed.host_link


@dataclass(frozen=True, kw_only=True)
class PausePrediction:
    """seconds: the predicted pause. moved_bytes: bytes that will cross ranks, over all ranks. cost: the bytes behind it."""

    seconds: float
    moved_bytes: int
    cost: Cost

    def __str__(self) -> str:
        return f"predicted pause {self.seconds:.3g} s, {self.moved_bytes / 1e6:.1f} MB move between ranks"


def predict_pause(backend: Backend, out: Collection[Parameter], speed: Bandwidths, *, keep: bool = False) -> PausePrediction:
    """The pause of a change after which exactly the parameters `out` are out of the optimizer: freezes and thaws.

    Changes nothing, communicates nothing; the same on every rank.
    keep: the released state is held on the host (`keep_state`).
    """
    cost, out = Cost(), set(out)
    freeze, thaw = out - backend.frozen, backend.frozen - out
    if isinstance(backend, FlatBackend):
        for index, group in enumerate(backend.groups):
            held = backend.active(index)
            left = [p for p in group if p not in out]
            # ZeRO-3 keeps the weights of all groups in one buffer, which is made anew.
            if set(left) != set(held) or (held and isinstance(backend, Zero3Backend)):
                cost += _group_cost(backend, index, held, left, keep=keep)
        if isinstance(backend, Zero3Backend):
            cost += _gather_cost(backend.gathered_by(out))
    else:
        cost = Cost(copied_bytes=backend.copied_bytes(freeze, thaw))
    return PausePrediction(seconds=cost.seconds(speed), moved_bytes=cost.moved_bytes, cost=cost)


def layout_cost(
    old: FlatLayout | PackedLayout,
    new: FlatLayout,
    element_sizes: Sequence[int],
    *,
    weight_bytes: int,
    on_host: bool,
    keep: bool = False,
) -> Cost:
    """What one parameter group costs whose parameters go from `old` to `new`.

    old: a FlatLayout, or what waits on the host for a thaw.

    element_sizes: bytes an element of each tensor that is laid out so: master weights, moments.
    weight_bytes: bytes of low-precision weights that a rank writes anew.
    on_host: whether state lives in host memory.
    keep: what leaves is copied to the host besides.
    """
    moves = plan_moves(old, new, new.params)
    crossing = [m for m in moves if m.source != m.target]
    staying = max((sum(m.numel for m in moves if m.source == m.target == rank) for rank in range(new.world)), default=0)
    cost = Cost(copied_bytes=weight_bytes)
    for size in element_sizes:
        busiest = exchanges = 0
        for batch in _rounds(crossing, new.world, max(1, STAGING_BYTES // size)):
            busiest += _busiest(batch, new.world)
            exchanges += 1
        # flat.py and layout.py: a new partition is cleared; what stays is copied into it, what crosses is staged on both sides. Off the
        # host, the old partition goes there first, and what is sent or stays comes from there.
        if isinstance(old, FlatLayout):
            copied = new.partition_size + staying + 2 * busiest + (max(0, old.partition_size - new.partition_size) if keep else 0)
            linked = 0 if on_host else old.partition_size + staying + busiest
        else:  # the new partition is counted with the rest of the group
            copied, linked = staying + 2 * busiest, 0 if on_host else staying + busiest
        cost += Cost(
            moved_bytes=bytes_sent(moves, size),
            busiest_bytes=busiest * size,
            least_busiest_bytes=_busiest(crossing, new.world) * size,
            exchanges=exchanges,
            copied_bytes=copied * size,
            linked_bytes=linked * size,
        )
    return cost


def _busiest(moves: Sequence[Move], world: int) -> int:
    """Elements that the busiest rank sends or receives."""
    sent, received = [0] * world, [0] * world
    for m in moves:
        sent[m.source] += m.numel
        received[m.target] += m.numel
    return max(*sent, *received)


def measure_bandwidths(device: torch.device) -> Bandwidths:
    """Measure this cluster with a few megabytes, in some milliseconds. Collective; rank 0's figures, on every rank.

    device: where the engine's parameters live.
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
    """Seconds of the fastest of a few calls after a first one that warms up."""
    fastest = math.inf
    for turn in range(times + 1):
        began = time.perf_counter()
        action()
        synchronize(device)
        if turn:
            fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _group_cost(backend: FlatBackend, index: int, held: Sequence[Parameter], left: Sequence[Parameter], *, keep: bool) -> Cost:
    world = backend.layout(index, held or left).world
    empty = FlatLayout((), world)
    old = backend.layout(index, held) if held else empty
    new = backend.layout(index, left) if left else empty
    master = backend.master(index)
    state = backend.base_optimizer().state.get(master, {}).values()
    tensors = [master]
    tensors += [v for v in state if isinstance(v, Tensor) and v.ndim > 0]
    weight = backend.low_precision((held or left)[0], 0, 0).element_size()
    # The weights go into a new buffer (cleared, then filled), those that leave into storages of their own.
    written = (2 * new.numel + max(0, old.numel - new.numel)) * weight
    if isinstance(backend, Bf16Backend | Zero3Backend):
        written += 4 * new.numel  # a new buffer for gradients
    sizes, on_host = [t.element_size() for t in tensors], master.device.type == "cpu"
    cost = layout_cost(old, new, sizes, weight_bytes=written, on_host=on_host, keep=keep)
    for waiting in backend.kept_layouts([p for p in left if p not in set(held)]):
        cost += layout_cost(waiting, new, sizes, weight_bytes=0, on_host=on_host)
    return cost


def _gather_cost(gathered: int) -> Cost:
    """ZeRO-3 gathers weights that are to stay whole. gathered: bytes of them, whole."""
    world = dist.get_world_size()
    arriving = gathered * (world - 1) // world  # on each rank
    return Cost(
        moved_bytes=gathered * (world - 1),
        busiest_bytes=arriving,
        least_busiest_bytes=arriving,
        exchanges=int(gathered > 0),
        copied_bytes=gathered,
    )
