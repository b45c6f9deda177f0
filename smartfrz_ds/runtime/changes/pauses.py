"""Predicts the pause of a change of the layout, over all stages of a pipeline.

Memory is measured once, on the state that a change would copy. The network is measured only among the ranks that exchange state, and only
as far as that tells more than it costs:

    the change exchanges nothing (one process, DDP, FSDP, ZeRO-0)   no collective but one broadcast, once
    it exchanges less than `PROBE_BYTES`                            the latency, with messages of a byte
    it exchanges more                                               the bandwidth too, once

An exchange among all ranks of a large cluster would set up connections between all pairs of ranks only to predict a pause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch.nn import Parameter

from smartfrz_ds.backends.cost import (
    PROBE_BYTES,
    Bandwidths,
    Cost,
    PausePrediction,
    measure_latency,
    measure_memory,
    measure_network,
)
from smartfrz_ds.backends.state_layout import state_tensors
from smartfrz_ds.runtime.run_context import RunContext


class Pauses:
    """Predicts pauses from bandwidths that are measured when they are first needed."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._memory: tuple[float, float] | None = None
        self._latency: dict[dist.ProcessGroup | None, float] = {}
        self._network: dict[dist.ProcessGroup | None, float] = {}

    def between_stages(self) -> Bandwidths:
        """Return the bandwidths between the stages of a pipeline, on every rank those that rank 0 has measured. Collective."""
        return self._bandwidths(self._run.backend.rank_groups().stages, latency=True, network=True)

    def predict(self, leaving: Sequence[Parameter]) -> PausePrediction:
        """Predict the pause of a change after which exactly these parameters are out of the optimizer. Collective."""
        run = self._run
        cost = run.backend.change_cost(set(leaving), keep=run.keep_steps > 0)
        own = PausePrediction.of(cost, self._speed(cost))
        if not run.backend.is_pipeline:
            return own
        # Each stage has its own: all wait for the slowest.
        seconds = -run.ranks.all_reduce_min([-own.seconds])[0]
        return PausePrediction(seconds=seconds, moved_bytes=self.of_all_stages(own.moved_bytes), cost=own.cost)

    def of_all_stages(self, moved: int) -> int:
        """Add up, over the stages of a pipeline, bytes that moved within the replicas of this stage. Collective there."""
        run = self._run
        if not run.backend.is_pipeline:
            return moved
        return int(run.ranks.all_reduce_sum([float(moved) if run.backend.is_sampling_rank else 0.0])[0])

    def _speed(self, cost: Cost) -> Bandwidths:
        """Return the bandwidths that this change needs, which is the same for all ranks that exchange its state."""
        large = cost.busiest_bytes >= PROBE_BYTES
        return self._bandwidths(self._run.backend.rank_groups().exchange, latency=cost.exchanges > 0, network=cost.exchanges > 0 and large)

    def _bandwidths(self, group: dist.ProcessGroup | None, *, latency: bool, network: bool) -> Bandwidths:
        backend, device = self._run.backend, self._run.backend.device
        if self._memory is None:
            held = (*backend.masters(), *state_tensors(backend.base_optimizer().state))
            told = self._run.ranks.broadcast(measure_memory(device, held))  # each rank's own differs; predictions do not
            self._memory = told[0], told[1]
        if latency and group not in self._latency:
            self._latency[group] = measure_latency(device, group)
        if network and group not in self._network:
            self._network[group] = measure_network(device, group, self._latency[group])
        memory, link = self._memory
        return Bandwidths(network=self._network.get(group, math.inf), memory=memory, host_link=link, latency=self._latency.get(group, 0.0))
