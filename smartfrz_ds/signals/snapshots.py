"""The choice of the sampled weights of each layer, and how the samples reach rank 0.

The indices are drawn once, from the seed and the layer's position, and are the same on every rank. Drawing them again
would lose the trajectories of the sampled weights. Each rank reads the weights that it owns; one reduction of
[layers, sample_size] floats combines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from smartfrz_ds.backends.base import Backend, Sampler, SampleRequest
from smartfrz_ds.model.layers import Layer, shape_of
from smartfrz_ds.model.sampling import sample_indices, sampled_params


class Snapshots:
    """Takes snapshots of the active layers of one engine.

    Args:
        layers: All layers, front to back.
        backend: The engine's backend.
        sample_size: Weights sampled from each layer, >= 1.
        seed: Seed for the choice of the weights.

    Attributes:
        requests: The sampled weights of each layer.
    """

    def __init__(self, layers: Sequence[Layer], backend: Backend, *, sample_size: int, seed: int) -> None:
        self.backend = backend
        self.sample_size = sample_size
        self.rows = len(layers)
        self._seed = seed
        self.choose_weights(layers)
        self._sampler: Sampler | None = None
        self._groups = backend.rank_groups()

    def choose_weights(self, layers: Sequence[Layer]) -> None:
        """Choose the weights. Called again after layers have moved between ranks, it chooses the same weights at their new place."""
        self.requests = [self._requests_of(layer, row, self._seed) for row, layer in enumerate(layers)]

    def _requests_of(self, layer: Layer, row: int, seed: int) -> list[SampleRequest]:
        params = sampled_params(layer)
        sizes = [prod(shape_of(p)) for p in params]
        if not sum(sizes):
            return []
        generator = torch.Generator().manual_seed((seed * 1_000_003 + layer.position) % 2**63)
        chosen = sample_indices(sum(sizes), self.sample_size, generator)
        requests, begin = [], 0
        for param, size in zip(params, sizes, strict=True):
            columns = ((chosen >= begin) & (chosen < begin + size)).nonzero().view(-1)
            if columns.numel():
                requests.append(SampleRequest(param, chosen[columns] - begin, row * self.sample_size + columns))
            begin += size
        return requests

    def compile(self, active: Sequence[int]) -> None:
        """Prepare the sampler. Call at start and after every change of the layout.

        Args:
            active: Positions of the layers to sample.
        """
        requests = [r for row in active for r in self.requests[row]]
        self._groups = self.backend.rank_groups()
        self._sampler = self.backend.sampler(requests, self.rows * self.sample_size)

    def take(self) -> Tensor | None:
        """Read the samples of all layers. Collective if the engine's state is sharded.

        Returns:
            On rank 0, (layers, sample_size) fp32 on the host, with zeros for layers that were not compiled; None
            elsewhere.
        """
        assert self._sampler is not None
        if not self._groups.holds_samples:
            return None
        values = self._sampler.read(self.backend.device)
        if self.backend.sharded:
            # Each weight has one owner and zeros elsewhere, so the sum equals the value bit for bit.
            dist.reduce(values, dst=0, group=self._groups.sampling)
        return values.view(self.rows, self.sample_size).cpu() if self.backend.rank == 0 else None
