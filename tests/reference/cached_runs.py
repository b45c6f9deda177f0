"""A training over several epochs with the prefix cache off or on: the same seeds, so that all bits can be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import smartfrz_ds

ROWS, BATCH, EPOCHS = 16, 4, 3
Inputs = dict[str, Any]


@dataclass
class Run:
    """losses: of every micro-batch; weights: at the end; note: the report's; cache: counts of the cache at the end."""

    losses: list[float] = field(default_factory=list)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    note: str = ""
    hits: int = 0


def batches(
    data: Inputs, *, shuffle: bool = True, epochs: int = EPOCHS, batch: int = BATCH, rank: int = 0, world: int = 1
) -> Iterator[Inputs]:
    """Batches of rows of `data`, shuffled over all ranks in each epoch; the last one is short where `batch` does not divide the rows."""
    rows = max(len(x) for x in data.values() if isinstance(x, Tensor))
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch)) if shuffle else torch.arange(rows)
        own = order[rank::world]
        for start in range(0, len(own), batch):
            chosen = own[start : start + batch]
            yield {k: v[chosen] if isinstance(v, Tensor) and len(v) == rows else v for k, v in data.items()}


def loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    return (output if isinstance(output, Tensor) else output[0]).float().square().mean()


def train(
    make: Callable[[], nn.Module],
    data: Inputs,
    mode: str,
    *,
    frozen: int,
    settings: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    between: Callable[[int, nn.Module, Any], object] = lambda step, model, controller: None,
    alter: Callable[[int, Inputs], Inputs] = lambda step, batch: batch,
    **of_batches: Any,
) -> Run:
    """Freeze the first `frozen` layers before the first step and train.

    Args:
        between: Called before each step with its number, the model and the controller.
        alter: Given the number of a step and its batch; returns the batch to train on.
    """
    torch.manual_seed(0)
    model, run = make(), Run()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    about = {"mode": mode, "min_gain": 1, "memory": "16MiB", **(cache or {})}
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "cache": about, **(settings or {})})
    controller.freeze(controller.layers[:frozen])
    torch.manual_seed(1)
    for step, batch in enumerate(batches(data, **of_batches)):
        between(step, model, controller)
        loss = loss_of(model(**alter(step, batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
    run.weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    run.note, run.hits = controller.report().cache_note, hits_of(controller)
    controller.detach()
    return run


def hits_of(controller: Any) -> int:
    watch = controller._cache
    return 0 if watch is None else watch.numbers()[1]


def both(make: Callable[[], nn.Module], data: Inputs, *, mode: str = "on", **options: Any) -> Run:
    """Train with the cache off and with it, require that all losses and weights are equal bit for bit, and return the latter.

    Args:
        mode: Of the cache. Where it turns out to be off, "auto", as "on" raises. Else "on", so that timing decides nothing.
    """
    off, with_cache = train(make, data, "off", **options), train(make, data, mode, **options)
    assert with_cache.losses == off.losses, with_cache.note
    assert torch.equal(with_cache.weights, off.weights), with_cache.note
    assert off.note == "" and all(x == x for x in off.losses)
    return with_cache


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
