"""Rearranging a flat buffer in place, against a slow obvious reference: lists of elements."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat import permute, weights
from smartfrz_ds.backends.deepspeed.flat.permute import Permutation, Shift, Swap, moved, rotation, sorting
from smartfrz_ds.backends.deepspeed.flat.weights import FlatWeights, Place


@given(left=st.integers(0, 60), right=st.integers(0, 60), limit=st.integers(1, 9), begin=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_rotation_swaps_two_sides_and_is_taken_back(left: int, right: int, limit: int, begin: int) -> None:
    values = torch.arange(begin + left + right + 2)
    buffer = values.clone()
    permutation = Permutation(buffer, rotation(begin, left, right, limit), limit)
    permutation.run()
    mine = values.tolist()
    a, b = mine[begin : begin + left], mine[begin + left : begin + left + right]
    assert buffer.tolist() == [*mine[:begin], *b, *a, *mine[begin + left + right :]]
    permutation.undo()
    assert torch.equal(buffer, values)


@given(order=st.integers(1, 12).flatmap(lambda n: st.permutations(range(n))), data=st.data(), limit=st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_blocks_are_sorted(order: list[int], data: st.DataObject, limit: int) -> None:
    sizes = [data.draw(st.integers(1, 12)) for _ in order]
    blocks = list(torch.arange(sum(sizes)).split(sizes))
    buffer = torch.cat(blocks)
    Permutation(buffer, sorting(order, sizes, limit), limit).run()
    wanted = torch.cat([blocks[order.index(place)] for place in range(len(order))])
    assert torch.equal(buffer, wanted)


def test_a_frozen_prefix_costs_one_rotation() -> None:
    assert sorting([2, 0, 1], [40, 30, 30], 8) == rotation(0, 40, 60, 8)
    assert sorting([0, 1, 2], [5, 5, 5], 8) == []
    assert moved([Swap(0, 5, 5), Shift(0, 2, 3)]) == 3 * 5 + (2 * 2 + 3)
    assert moved([Shift(0, 2, 300)]) == 2 * 2 + 2 * 300


def test_a_shift_by_a_large_distance_stages_no_pieces() -> None:
    assert Permutation(torch.zeros(100), [Shift(0, 30, 70)], 50)._sizes == (30, 0)
    assert Permutation(torch.zeros(100), [Shift(0, 1, 99)], 50)._sizes == (1, 50)


class Failing:
    """Lets the n-th copy of the whole test raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left, original = at, Tensor.copy_

        def copy(target: Tensor, source: Tensor, *args: Any) -> Tensor:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("injected")
            return original(target, source, *args)

        monkeypatch.setattr(Tensor, "copy_", copy)


@pytest.mark.parametrize("sides", [(17, 40), (40, 17), (3, 50), (50, 3), (20, 20)])
def test_an_error_in_any_copy_leaves_whole_operations(monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int]) -> None:
    values = torch.randn(sum(sides))
    values[3] = float("nan")
    operations = rotation(0, *sides, 5)
    for at in range(1, 200):
        buffer = values.clone()
        permutation = Permutation(buffer, operations, 5)
        with monkeypatch.context() as patch:
            failing = Failing(patch, at)
            try:
                permutation.run()
            except RuntimeError:
                failing.left = -1
            else:
                break
        permutation.undo()
        assert torch.equal(buffer.nan_to_num(7.0), values.nan_to_num(7.0)), at
    assert at > 10


def model(sizes: list[int], padding: int) -> tuple[list[Parameter], FlatWeights]:
    """Parameters in one flat buffer, as DeepSpeed makes it."""
    flat = torch.zeros(sum(sizes) + padding)
    params = []
    for begin, size in zip(accumulate([0, *sizes]), sizes, strict=False):
        param = Parameter(torch.empty(0))
        param.data = flat[begin : begin + size]
        param.data.copy_(torch.arange(size) + 100.0 * (len(params) + 1))
        params.append(param)
    return params, FlatWeights(flat[:-1] if padding else flat)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    data=st.data(),
    align=st.sampled_from([1, 4, 16]),
    gap=st.sampled_from([0, 0, 3]),
    limit=st.integers(1, 20),
)
@settings(max_examples=300, deadline=None)
def test_freezes_and_thaws_keep_every_weight(sizes: list[int], data: st.DataObject, align: int, gap: int, limit: int) -> None:
    params, flat = model(sizes, padding=-sum(sizes) % align)
    adopted = Parameter(torch.full((7,), 3.0))  # never was in the buffer
    everything, values = [*params, adopted], {p: p.detach().clone() for p in (*params, adopted)}
    patch = pytest.MonkeyPatch()
    patch.setattr(permute, "PIECE_BYTES", limit * 4)
    patch.setattr(weights, "PIECE_BYTES", limit * 4)
    try:
        for _ in range(3):
            active = data.draw(st.permutations(data.draw(st.lists(st.sampled_from(everything), min_size=1, unique_by=id))))
            places, end = [], 0
            for p in active:
                places.append(Place(p, end, p.numel()))
                end += p.numel() + gap
            front = -(-end // align) * align
            frozen = [p for p in everything if p not in set(active)]
            before = {p: p.data for p in everything}
            plan = flat.plan(places, front, frozen)
            move = flat.make(plan)
            move.run()
            check(flat, places, front, frozen, values)
            if data.draw(st.booleans()):
                move.undo()
                for p in everything:
                    assert p.data.data_ptr() == before[p].data_ptr() and torch.equal(p.data, values[p])
    finally:
        patch.undo()


def check(flat: FlatWeights, places: list[Place], front: int, frozen: list[Parameter], values: dict[Parameter, Tensor]) -> None:
    seen = flat.front(front)
    covered = torch.zeros(front, dtype=torch.bool)
    for place in places:
        part = seen[place.offset : place.offset + place.numel]
        assert torch.equal(part, values[place.holder]) and part.data_ptr() == place.holder.data_ptr()
        covered[place.offset : place.offset + place.numel] = True
    assert not seen[~covered].any()
    for p in frozen:
        assert torch.equal(p.data, values[p])
        begin = flat.offset(p)
        assert begin is None or begin >= front


def test_only_a_small_parameter_leaves_the_buffer_for_the_padding() -> None:
    """Where one active element is padded to four, three frozen ones lack room: the smallest parameters that make it leave."""
    params, flat = model([4, 2, 1, 1], padding=0)
    plan = flat.plan([Place(params[3], 0, 1)], 4, params[:3])
    assert [p.numel() for p in plan.evicted] == [1, 2]
    assert plan.extra == 3 and plan.capacity == 0
    plan = flat.plan([Place(params[3], 0, 1)], 2, params[:3])
    assert len(plan.evicted) == 1 and plan.evicted[0] is params[2]
