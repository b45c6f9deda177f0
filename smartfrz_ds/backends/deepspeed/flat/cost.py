"""The bytes that a change of flat buffers moves, computed from the layouts before it happens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.cost import Cost

from .partition import STAGING_BYTES, FlatLayout, PackedLayout, SliceMove, bytes_sent, plan_moves

if TYPE_CHECKING:
    from .backend import FlatBackend


def flat_change_cost(backend: FlatBackend, out: Collection[Parameter], *, keep: bool) -> Cost:
    """Return the cost of a change, all groups together.

    Args:
        backend: The engine's backend.
        out: All parameters that are outside of the optimizer afterwards.
        keep: As in `layout_cost`.
    """
    cost, changed, layouts = Cost(), [], []
    for index, group in enumerate(backend.groups):
        held = backend.active(index)
        left = [p for p in group if p not in out]
        # the layout itself, which remembers the plan for the change that follows
        old = backend.layouts[index] if held else _layout(backend, index, [], left)
        new = _layout(backend, index, left, held or left)
        layouts.append(new)
        if set(left) != set(held):
            changed.append(index)
            cost += _group_cost(backend, index, old, new, keep=keep)
        elif backend.makes_gradient_buffer and backend.shares_one_buffer:
            cost += Cost(copied_bytes=4 * new.numel)  # a buffer for the gradients of all groups together
    written = sum(plan.written * weights.element_size for weights, plan in backend.weight_plans(changed, layouts))
    return cost + Cost(copied_bytes=written)


def _layout(backend: FlatBackend, index: int, params: Sequence[Parameter], some: Sequence[Parameter]) -> FlatLayout:
    return backend.layout(index, params) if params else FlatLayout((), backend.layout(index, some).world)


def layout_cost(
    old: FlatLayout | PackedLayout,
    new: FlatLayout,
    element_sizes: Sequence[int],
    *,
    weight_bytes: int,
    on_host: bool,
    keep: bool = False,
) -> Cost:
    """Return the cost of moving the state of one parameter group from `old` to `new`.

    Args:
        old: The layout before, or that of state that waits on the host for a thaw.
        new: The layout afterwards.
        element_sizes: Bytes per element of each tensor with this layout: master weights, moments.
        weight_bytes: Bytes of low-precision weights that a rank writes.
        on_host: Whether the state is in host memory.
        keep: Whether the state that leaves is also copied to the host.
    """
    moves = plan_moves(old, new, new.params)
    staying, at_once = moves.most_staying, _busiest(moves.crossing, new.world)
    cost = Cost(copied_bytes=weight_bytes)
    in_rounds: dict[int, tuple[int, int]] = {}  # by bytes per element: what the busiest ranks send or receive, and the exchanges
    for size in element_sizes:
        if size not in in_rounds:
            batches = moves.rounds(new.world, max(1, STAGING_BYTES // size))
            in_rounds[size] = sum(_busiest(batch, new.world) for batch in batches), len(batches)
        busiest, exchanges = in_rounds[size]
        # state_moves.py and partition.py: a new partition is cleared. Elements that stay are copied into it, the others are staged on both
        # sides. On a device, the old partition is first copied to the host, from which all elements then come.
        if isinstance(old, FlatLayout):
            copied = new.partition_size + staying + 2 * busiest + (max(0, old.partition_size - new.partition_size) if keep else 0)
            linked = 0 if on_host else old.partition_size + staying + busiest
        else:  # the new partition is counted with the rest of the group
            copied, linked = staying + 2 * busiest, 0 if on_host else staying + busiest
        cost += Cost(
            moved_bytes=bytes_sent(moves, size),
            busiest_bytes=busiest * size,
            least_busiest_bytes=at_once * size,
            exchanges=exchanges,
            copied_bytes=copied * size,
            linked_bytes=linked * size,
        )
    return cost


def _busiest(moves: Sequence[SliceMove], world: int) -> int:
    """Return the elements that the busiest rank sends or receives."""
    sent, received = [0] * world, [0] * world
    for m in moves:
        sent[m.source] += m.numel
        received[m.target] += m.numel
    return max(*sent, *received)


def _group_cost(backend: FlatBackend, index: int, old: FlatLayout, new: FlatLayout, *, keep: bool) -> Cost:
    """Return the cost of the optimizer's state of one group, and of its gradients."""
    master = backend.master(index)
    state = backend.base_optimizer().state.get(master, {}).values()
    tensors = [master]
    tensors += [v for v in state if isinstance(v, Tensor) and v.ndim > 0]
    written = 4 * new.numel if backend.makes_gradient_buffer else 0  # a new buffer for gradients
    sizes, on_host = [t.element_size() for t in tensors], master.device.type == "cpu"
    cost = layout_cost(old, new, sizes, weight_bytes=written, on_host=on_host, keep=keep)
    held = set(old.params)
    for waiting in backend.kept_layouts([p for p in new.params if p not in held]):
        cost += layout_cost(waiting, new, sizes, weight_bytes=0, on_host=on_host)
    return cost


def gather_cost(gathered: int) -> Cost:
    """Return the cost of gathering weights that ZeRO-3 then keeps whole. gathered: their bytes, whole."""
    world = dist.get_world_size()
    arriving = gathered * (world - 1) // world  # on each rank
    return Cost(
        moved_bytes=gathered * (world - 1),
        busiest_bytes=arriving,
        least_busiest_bytes=arriving,
        exchanges=int(gathered > 0),
        copied_bytes=gathered,
    )
