"""The gradient of each layer at its sampled weights, summed over steps: what some policies judge by.

Taken from tensor hooks, which see what backward brings to a parameter before anybody accumulates, reduces or partitions it: under every
ZeRO stage, and with any accumulation, that is this rank's gradient of this micro-batch and of all of the parameter. The sums of the ranks
meet in one reduction of [layers, sample_size] floats at a freezing stage. What clipping does to a gradient comes later and is not seen.
A script that itself asks torch.autograd.grad for the gradients of parameters has those counted too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smartfrz_ds.backends.base import SampleRequest
from smartfrz_ds.model.tensor_json import decode, encode


class GradientSums:
    """Sums the sampled gradients of the steps since the last `restart`.

    names: of the layers, in order; the rows. requests: what is sampled of each layer, as of its snapshots. sample_size: columns.
    device: where the sums are kept. loss_scale: what the losses of now are multiplied by (fp16), 1 where they aren't.
    """

    def __init__(
        self,
        names: Sequence[str],
        requests: Sequence[Sequence[SampleRequest]],
        sample_size: int,
        device: torch.device,
        loss_scale: Callable[[], float],
    ) -> None:
        self._names, self._size, self._loss_scale = tuple(names), sample_size, loss_scale
        self._total = torch.zeros(len(names) * sample_size, dtype=torch.float32, device=device)
        self._step = torch.zeros_like(self._total)  # of the step that is going on; nothing if it is skipped
        self._stale: set[str] = set()  # layers that were not watched in all of the interval
        self._handles: list[Any] = []
        self.watch(requests)

    def watch(self, requests: Sequence[Sequence[SampleRequest]]) -> None:
        """Hook what is sampled of the layers, as far as it trains now; between steps."""
        self.remove()
        self._handles = [
            r.param.register_hook(partial(self._add, r.elements.to(self._total.device), r.slots.to(self._total.device)))
            for layer in requests
            for r in layer
            if r.param.requires_grad
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def end_step(self, *, applied: bool) -> None:
        """A step is over; what belongs to a skipped one does not count."""
        if applied:
            self._total += self._step
        self._step.zero_()

    def restart(self) -> None:
        """Begin a new interval. What backward has brought for the step that is going on counts for the new one."""
        self._total.zero_()
        self._stale.clear()

    def forget(self, names: Collection[str]) -> None:
        """These layers have trained in a part of the interval only: they get no number until the next one."""
        self._stale |= set(names)

    def take(self, active: Collection[str]) -> dict[str, Tensor]:
        """On rank 0 the sum of each layer of `active`, (sample_size,) fp32 on the host, mean over the ranks; else nothing. Collective."""
        world = _world()
        total = self._total
        if world > 1:
            total = total.clone()
            dist.reduce(total, dst=0)
            if dist.get_rank() != 0:
                return {}
        rows = (total / world).view(len(self._names), self._size).cpu()
        return {name: row for name, row in zip(self._names, rows, strict=True) if name in active and name not in self._stale}

    def sync_for_checkpoint(self) -> None:
        """Bring the sums of all ranks to rank 0, where one state can stand for all. Collective; for a checkpoint."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.reduce(self._total, dst=0)
            if dist.get_rank() != 0:
                self._total.zero_()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; whole on rank 0 right after `sync_for_checkpoint`."""
        return {"sums": encode(self._total), "stale": sorted(self._stale), "world": _world()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """state: of rank 0, the same on every rank; None, or one with another sample size: nothing is known of this interval."""
        self._step.zero_()
        self._total.zero_()
        sums = None if state is None else decode(state["sums"])
        if state is None or sums is None or sums.shape != self._total.shape:
            self._stale = set(self._names)
            return
        self._stale = set(state["stale"])
        if not dist.is_initialized() or dist.get_rank() == 0:
            # Means over the ranks count: with another number of ranks the sum is another.
            saved = int(state.get("world", _world()))
            self._total.copy_(sums if saved == _world() else sums * (_world() / saved))

    @torch.no_grad()
    def _add(self, elements: Tensor, slots: Tensor, gradient: Tensor) -> None:
        # one micro-batch may bring several parts of a gradient (regions under reentrant checkpointing): they add up
        values = gradient.reshape(-1).index_select(0, elements).to(self._step.device, torch.float32)
        self._step.index_add_(0, slots, values / self._loss_scale())


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
