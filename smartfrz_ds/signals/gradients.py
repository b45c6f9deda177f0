"""Sums over steps of each layer's gradient at its sampled weights, for policies that judge by gradients.

Tensor hooks see what backward brings to a parameter before it is accumulated, reduced or partitioned. Under every
ZeRO stage and with any accumulation this is the rank's gradient of the micro-batch for the whole parameter. One
reduction of [layers, sample_size] floats combines the ranks' sums at a freezing stage. Gradient clipping happens
later and is not visible. Calls of torch.autograd.grad on parameters by the script are counted too.
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

    Args:
        names: Names of the layers, in order; the rows.
        requests: The sampled weights of each layer, as for its snapshots.
        sample_size: Number of columns.
        device: Where the sums are kept.
        loss_scale: Returns the factor by which losses are currently multiplied (fp16); 1 without loss scaling. A tensor
            is not read.
    """

    def __init__(
        self,
        names: Sequence[str],
        requests: Sequence[Sequence[SampleRequest]],
        sample_size: int,
        device: torch.device,
        loss_scale: Callable[[], float | Tensor],
    ) -> None:
        self._names, self._size, self._loss_scale = tuple(names), sample_size, loss_scale
        self._total = torch.zeros(len(names) * sample_size, dtype=torch.float32, device=device)
        self._step = torch.zeros_like(self._total)  # of the current step; discarded if the step is skipped
        self._scale: float | Tensor | None = None  # of the current step's losses; None: not asked yet
        self._stale: set[str] = set()  # layers that were not watched during the whole interval
        self._handles: list[Any] = []
        self.watch(requests)

    def watch(self, requests: Sequence[Sequence[SampleRequest]]) -> None:
        """Register hooks on the sampled parameters that currently require gradients. Call between steps.

        Args:
            requests: As in the constructor.
        """
        self.remove()
        self._handles = [
            r.param.register_hook(partial(self._add, r.elements.to(self._total.device), r.slots.to(self._total.device)))
            for layer in requests
            for r in layer
            if r.param.requires_grad
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def end_step(self, *, applied: bool) -> None:
        """Finish a step.

        Args:
            applied: Whether the optimizer took the step; a skipped step is not counted.
        """
        if applied:
            self._total += self._step
        self._scale = None
        self._step.zero_()

    def restart(self) -> None:
        """Start a new interval. What backward has already added in the current step counts for the new interval."""
        self._total.zero_()
        self._stale.clear()

    def forget(self, names: Collection[str]) -> None:
        """Drop the layers `names` until the next interval, because they have trained in only a part of this one."""
        self._stale |= set(names)

    def take(self, active: Collection[str]) -> dict[str, Tensor]:
        """Collect the sums of the active layers on rank 0. Collective.

        Args:
            active: Names of the active layers.

        Returns:
            On rank 0, for each active layer that was watched during the whole interval, (sample_size,) fp32 on the
            host, averaged over the ranks; an empty dict elsewhere.
        """
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
        """Reduce the sums of all ranks to rank 0, whose state then represents all ranks. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.reduce(self._total, dst=0)
            if dist.get_rank() != 0:
                self._total.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data; complete on rank 0 right after `sync_for_checkpoint`."""
        return {"sums": encode(self._total), "stale": sorted(self._stale), "world": _world()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore a saved state.

        Args:
            state: Rank 0's state, the same on every rank. None, or a state with another sample size, makes this
                interval unknown.
        """
        self._scale = None
        self._step.zero_()
        self._total.zero_()
        sums = None if state is None else decode(state["sums"])
        if state is None or sums is None or sums.shape != self._total.shape:
            self._stale = set(self._names)
            return
        self._stale = set(state["stale"])
        if not dist.is_initialized() or dist.get_rank() == 0:
            # The ranks' mean is what counts: rescale the sum if the number of ranks has changed.
            saved = int(state.get("world", _world()))
            self._total.copy_(sums if saved == _world() else sums * (_world() / saved))

    @torch.no_grad()
    def _add(self, elements: Tensor, slots: Tensor, gradient: Tensor) -> None:
        # A micro-batch may bring a gradient in several parts (regions under reentrant checkpointing), which add up.
        values = gradient.reshape(-1).index_select(0, elements).to(self._step.device, torch.float32)
        if self._scale is None:
            self._scale = self._loss_scale()
        self._step.index_add_(0, slots, values / self._scale)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
