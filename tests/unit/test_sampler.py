"""Samples are read by one gather for each kind of memory, and are those that reading tensor by tensor gives.

Background: a snapshot read 4,800 small matrices one after another, each with a copy and three kernels: 61 ms. The addresses of the samples
are indices of one index_select now. What counts here are operations and values.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from reference.oracle import Net
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import smartfrz_ds
from smartfrz_ds.backends.sampler import Sampler, read_each

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """Counts the operations of the block."""

    def __enter__(self) -> Any:
        self.count: Counter[str] = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def draw(tensor: Tensor, count: int) -> Tensor:
    return torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(tensor.numel()))[:count]


def sampler_of(tensors: list[Tensor], count: int = 5) -> tuple[Sampler, Tensor]:
    """A sampler of `count` elements of each tensor, in mixed slots with gaps, and the snapshot that it should read."""
    slots = torch.randperm(2 * count * len(tensors), generator=torch.Generator().manual_seed(0)).view(len(tensors), -1)[:, :count]
    sampler = Sampler(2 * count * len(tensors))
    elements = [draw(t, count) for t in tensors]
    for t, e, s in zip(tensors, elements, slots, strict=True):
        sampler.add(t, e, s)
    expected = torch.zeros(sampler.numel)
    expected[slots.flatten()] = torch.stack([t.detach().reshape(-1)[e].float() for t, e in zip(tensors, elements, strict=True)]).flatten()
    assert torch.equal(expected[slots.flatten()].view(torch.int32), read_each(tensors, elements, CPU).view(torch.int32))
    return sampler, expected


def kinds_of_tensors() -> list[Tensor]:
    torch.manual_seed(0)
    flat = torch.randn(500)
    grid = torch.randn(6, 4, 3, 3)
    return [
        Parameter(torch.randn(7, 9)),
        Parameter(torch.randn(5, 8).bfloat16()),
        torch.randn(30).half(),
        torch.randn(4, 4).double(),
        grid.to(memory_format=torch.channels_last),
        grid.permute(1, 3, 0, 2),
        flat[3:60],  # views of one buffer
        flat[60:260:2],
        torch.full((6,), float("nan")),
        Parameter(torch.randn(11)),
    ]


def test_every_kind_of_tensor_is_read_where_it_lies() -> None:
    sampler, expected = sampler_of(kinds_of_tensors())
    for _ in range(2):
        got = sampler.read(CPU)
        assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("replace", ["data", "in place", "resized"])
def test_a_tensor_that_lies_elsewhere_later_is_found(replace: str) -> None:
    params = [Parameter(torch.randn(6, 6)) for _ in range(4)]
    sampler, expected = sampler_of(params)
    assert torch.equal(sampler.read(CPU), expected)
    old = params[2].data
    new = torch.randn(6, 6)
    if replace == "data":
        params[2].data = new
    elif replace == "in place":
        with torch.no_grad():
            params[2].copy_(new)
    else:  # as FSDP1 does with the storage of a unit
        params[2].untyped_storage().resize_(0)
        params[2].untyped_storage().resize_(4 * 36)
        params[2].data.copy_(new)
    again, expected = sampler_of(params)
    assert torch.equal(sampler.read(CPU), expected) and torch.equal(again.read(CPU), expected)
    del old


def test_subclasses_are_read_one_by_one() -> None:
    class Wrapped(Tensor):
        pass

    tensors: list[Tensor] = [torch.randn(20).as_subclass(Wrapped), torch.randn(30), torch.randn(3, 8).as_subclass(Wrapped)]
    sampler, expected = sampler_of(tensors)
    got = sampler.read(CPU)
    assert torch.equal(got.as_subclass(Tensor), expected.as_subclass(Tensor))


def test_an_element_outside_of_its_tensor_is_not_read() -> None:
    sampler = Sampler(4)
    sampler.add(torch.randn(10), torch.tensor([1, 10]), torch.arange(2))
    with pytest.raises(IndexError, match="outside of its tensor"):
        sampler.read(CPU)


def test_nothing_to_read_is_zeros() -> None:
    sampler = Sampler(4)
    sampler.add(torch.randn(10), torch.arange(0), torch.arange(0))
    assert torch.equal(sampler.read(CPU), torch.zeros(4))


def test_the_number_of_operations_does_not_depend_on_the_number_of_tensors() -> None:
    counts = []
    for many in (3, 300):
        sampler, _ = sampler_of([Parameter(torch.randn(8, 8)) for _ in range(many)] + [torch.randn(9).bfloat16() for _ in range(many)])
        sampler.read(CPU)
        with Operations() as seen:
            sampler.read(CPU)
        counts.append(seen.count)
    assert counts[0] == counts[1]
    assert counts[1]["index_select"] == counts[1]["index_copy_"] == 2 and sum(counts[1].values()) <= 6, counts[1]


class Deep(torch.nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)) for _ in range(blocks)])
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_snapshot_of_a_run_takes_one_gather() -> None:
    counts = []
    for blocks in (4, 40):
        model = Deep(blocks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = smartfrz_ds.attach_torch(model, optimizer, {"total_steps": 1000, "sample_size": 8})
        snapshots = controller._recording.snapshots
        snapshots.take()
        with Operations() as seen:
            taken = snapshots.take()
        assert taken is not None
        rows = {layer.position: layer for layer in controller._run.layers if layer.kind != "head"}
        weights = [torch.cat([p.detach().flatten() for p in rows[i].params if p.ndim > 1]) for i in rows]
        assert all(bool(torch.isin(taken[i], w).all()) for i, w in zip(rows, weights, strict=True))
        counts.append(seen.count)
        controller.detach()
    assert counts[0] == counts[1] and counts[1]["index_select"] == 1 and sum(counts[1].values()) <= 6, counts


def test_the_samples_of_a_real_model_are_its_weights() -> None:
    model = Net()
    controller = smartfrz_ds.attach_torch(model, torch.optim.SGD(model.parameters(), lr=0.1), {"total_steps": 1000, "sample_size": 16})
    snapshots = controller._recording.snapshots
    expected = torch.zeros(snapshots.rows * snapshots.sample_size)
    for layer in controller._run.layers:
        if layer.kind != "head":
            for request in snapshots.requests[layer.position]:
                expected[request.slots] = request.param.detach().flatten()[request.elements]
    taken = snapshots.take()
    assert taken is not None and torch.equal(taken.flatten(), expected)
    controller.detach()
