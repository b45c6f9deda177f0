"""Moves the optimizer's state of one parameter group of a flat wrapper to another layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.transaction import Transaction

from .buffers import is_pinned, pinned_if
from .kept import Kept, grouped_kept
from .partition import FlatLayout, plan_moves
from .state_moves import GroupMoves, Returning, TensorMove, move_tensor
from .step_counts import zero_step

if TYPE_CHECKING:
    from .backend import FlatBackend

MASTER = "master"


def move_group_state(
    backend: FlatBackend, index: int, old: FlatLayout, new: FlatLayout, leaving: list[Parameter], *, keep: bool, tx: Transaction
) -> int:
    """Move the master and the moments of group `index` from one layout to another. Collective.

    Args:
        backend: The engine's backend.
        index: The group.
        old: Its layout before.
        new: Its layout afterwards.
        leaving: The parameters that only `old` has.
        keep: Whether their state is kept on the host.
        tx: The transaction of the change.

    Returns:
        Bytes that cross ranks, over all ranks.
    """
    master, waiting = backend.master(index), backend.kept_entries()
    entries = backend.base_optimizer().state.get(master, {})
    tensors = tensors_of(master, backend.base_optimizer())
    moves = GroupMoves.plan(old, new, leaving, rank=backend.group_rank(index), group=backend.process_group(index), keep=keep)
    kept = Kept(moves.kept)
    kept.step = {p: backend.step_of(p, entries) for p in leaving}
    coming = [p for p in new.params if p not in old.offsets and p is not backend.placeholders.get(index)]
    back = grouped_kept((p, waiting[p]) for p in coming if p in waiting)
    returns = [(k, plan_moves(k.layout, new, some)) for k, some in back]
    bare = [p for p in coming if p not in waiting]

    def fill(target: Tensor) -> None:
        """Start the masters of thawed parameters from the weights themselves, which this rank holds."""
        for param in bare:
            for s in new.segments(param):
                if s.rank == moves.rank:
                    target[s.offset : s.offset + s.numel].copy_(backend.low_precision(param, s.start, s.numel))

    moved = 0
    for key in list(tensors):
        install = _installer(master, entries, key)
        move = TensorMove(tensors.pop(key), moves, backend.link, backend.room)
        returning = [Returning(m, k.tensors[key]) for k, m in returns if key in k.tensors]
        name = f"{key} of group {index}"
        backend.room += move_tensor(tx, name, move, returning, install, fill if key == MASTER else None)
        moved += move.bytes_sent(returning)
        if keep:
            kept.tensors[key] = move.waiting
    with tx.step("note the kept state and the step counts"):
        if keep:
            backend.keep(dict.fromkeys(leaving, kept))
        _set_own_steps(backend, coming, waiting, entries)
    return moved


def tensors_of(master: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of one group that have the layout of its master: the master, then the moments."""
    state = optimizer.state.get(master, {})
    return {MASTER: master.detach()} | {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim > 0}


def _installer(master: Tensor, entries: dict[str, Any], key: str) -> Callable[[Tensor], None]:
    """Return a function that replaces a tensor of the optimizer. It must not keep the old tensor alive."""
    pinned = is_pinned(master if key == MASTER else entries[key])

    def install(tensor: Tensor) -> None:
        if key == MASTER:
            master.data = pinned_if(tensor, pinned)
        else:
            entries[key] = pinned_if(tensor, pinned)

    return install


def _set_own_steps(backend: FlatBackend, coming: Sequence[Parameter], waiting: Mapping[Parameter, Kept], entries: dict[str, Any]) -> None:
    """Give thawed parameters a step count of their own, unless it equals the group's."""
    if "step" not in entries:
        return
    for param in coming:
        step = waiting[param].step[param] if param in waiting else None
        if step is None:  # nothing was kept, or the group had not stepped yet when the parameter left it
            step = zero_step(entries["step"])
        if float(step) != float(entries["step"]):
            backend.own_steps.set(param, step)
