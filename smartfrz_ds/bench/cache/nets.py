"""The networks of `smartfrz bench cache` with their data, dealt out to the ranks as DistributedSampler does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, TensorDataset

from smartfrz_ds.bench.policies.nets import minilm_on_bbc
from smartfrz_ds.bench.policies.setups.data import Batch, Inputs
from smartfrz_ds.bench.zero_worker import BLOCKS, FEATURES, Net


@dataclass(frozen=True)
class Deal:
    """A batch of one rank.

    Attributes:
        epoch: Counted from 0.
        rows: The positions of its rows in the data set.
        inputs: Named arguments of the model.
        answers: Its targets, int64.
    """

    epoch: int
    rows: tuple[int, ...]
    inputs: Inputs
    answers: Tensor


def network(net: str, rows: int, length: int, params: float) -> tuple[nn.Module, Batch]:
    """Make a network and its data; the weights that are not pretrained come from torch's global generator.

    Args:
        net: "minilm": MiniLM-L6 on BBC News; "mlp": the network of `smartfrz bench zero`, on random rows.
        rows: Rows of the data set.
        length: Tokens of a row of MiniLM.
        params: Size of the other network, in millions of weights.
    """
    if net == "minilm":
        return minilm_on_bbc(length, rows)
    model = Net(params * 1e6)
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(0, FEATURES, (rows,), generator=generator)
    return model, ({"x": torch.randn(rows, FEATURES, generator=generator)}, answers)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the equal blocks of one of these networks."""
    return [model.get_submodule(f"blocks.{i}") for i in range(BLOCKS)] if isinstance(model, Net) else list(_layers(model))


def units_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 shards as a unit each: the embeddings and the blocks."""
    return [model.inp if isinstance(model, Net) else model.get_submodule("bert.embeddings"), *blocks_of(model)]


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return model.get_submodule("bert.encoder.layer").children()


def logits_of(output: Tensor | object) -> Tensor:
    """Return the logits in a model's output."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    assert isinstance(found, Tensor)
    return found


def deals(data: Batch, batch: int, epochs: int, rank: int, world: int, seed: int = 0) -> Iterator[Deal]:
    """Deal the rows out anew in each epoch, over all ranks, and keep the last short batch.

    Args:
        data: Inputs and answers of all rows.
        batch: Rows of a batch.
        epochs: Number of epochs.
        rank: Of these batches.
        world: Number of ranks.
        seed: Of the order.
    """
    inputs, answers = data
    dataset = TensorDataset(answers)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=False)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order: list[int] = list(sampler)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            yield Deal(epoch, tuple(rows), {name: values[rows] for name, values in inputs.items()}, answers[rows])
