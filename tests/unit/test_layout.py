"""Flat layouts and moves, against a slow obvious reference: one dictionary from (parameter, element) to (rank, offset)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat.partition import Exchange, FlatLayout, PackedLayout, SliceMove, _rounds, bytes_sent, plan_moves


def places(layout: FlatLayout) -> dict[tuple[int, int], tuple[int, int]]:
    """(parameter, element) -> (rank, offset), element by element."""
    out = {}
    for param in layout.params:
        for element in range(param.numel()):
            position = layout.offsets[param] + element
            out[id(param), element] = (position // layout.partition_size, position % layout.partition_size)
    return out


def carry_out(moves: Sequence[SliceMove], sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    for m in moves:
        targets[m.target][m.target_offset : m.target_offset + m.numel] = sources[m.source][m.source_offset : m.source_offset + m.numel]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(sizes=sizes, world=st.integers(1, 5), kept=st.data(), alignment=st.integers(1, 4), pad=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_moves_bring_every_kept_element_to_its_new_place(
    sizes: list[int], world: int, kept: st.DataObject, alignment: int, pad: int
) -> None:
    params = [Parameter(torch.zeros(n)) for n in sizes]
    old = FlatLayout(tuple(params), world, alignment * world, (pad,) * len(params))
    chosen = kept.draw(st.lists(st.sampled_from(params), min_size=1, unique_by=id))
    order = kept.draw(st.permutations(chosen))
    new = FlatLayout(tuple(order), world, alignment * world)
    before, after = places(old), places(new)
    sources = [torch.arange(old.partition_size, dtype=torch.float64) + 1000 * r for r in range(world)]
    targets = [torch.full((new.partition_size,), -1.0, dtype=torch.float64) for _ in range(world)]
    carry_out(plan_moves(old, new, new.params), sources, targets)
    for key, (rank, offset) in after.items():
        was_rank, was_offset = before[key]
        assert targets[rank][offset] == sources[was_rank][was_offset]
    assert sum((t >= 0).sum().item() for t in targets) == len(after)  # padding stays as it was


@given(sizes=sizes, world=st.integers(1, 5), kept=st.data())
@settings(max_examples=100, deadline=None)
def test_packed_state_comes_back_to_any_layout(sizes: list[int], world: int, kept: st.DataObject) -> None:
    params = [Parameter(torch.zeros(n)) for n in sizes]
    old = FlatLayout(tuple(params), world, 2 * world)
    gone = kept.draw(st.lists(st.sampled_from(params), min_size=1, unique_by=id))
    packed = PackedLayout.of(old, gone)
    assert sum(packed.sizes) == sum(p.numel() for p in gone)
    sources = [torch.arange(old.partition_size, dtype=torch.float64) + 1000 * r for r in range(world)]
    waiting = [torch.zeros(n, dtype=torch.float64) for n in packed.sizes]
    to_host = plan_moves(old, packed, gone)
    assert all(m.source == m.target for m in to_host)  # nothing is sent to be kept
    carry_out(to_host, sources, waiting)
    back = FlatLayout(tuple(gone[::-1]), world, world)
    targets = [torch.zeros(back.partition_size, dtype=torch.float64) for _ in range(world)]
    carry_out(plan_moves(packed, back, gone), waiting, targets)
    before = places(old)
    for key, (rank, offset) in places(back).items():
        was_rank, was_offset = before[key]
        assert targets[rank][offset] == sources[was_rank][was_offset]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 50)), max_size=12), st.integers(1, 30))
def test_rounds_stay_under_the_limit_and_lose_nothing(raw: list[tuple[int, int, int]], limit: int) -> None:
    moves = [SliceMove(s, 100 * k, t, 200 * k, n) for k, (s, t, n) in enumerate(raw)]
    rounds = list(_rounds(moves, 4, limit))
    for batch in rounds:
        for rank in range(4):
            assert sum(m.numel for m in batch if m.source == rank) <= limit
            assert sum(m.numel for m in batch if m.target == rank) <= limit

    def elements(moves: list[SliceMove], source: int) -> list[tuple[int, int, int]]:
        return [(m.source_offset + i, m.target, m.target_offset + i) for m in moves if m.source == source for i in range(m.numel)]

    for source in range(4):  # and each rank sends in its order
        assert elements([m for b in rounds for m in b], source) == elements(moves, source)
    assert all(rounds)


def test_all_ranks_send_in_the_same_round() -> None:
    """A group that shifts by one partition: with a limit of 5 elements each, 10 elements a rank need two rounds, whatever the ranks."""
    moves = [SliceMove(r, 0, r - 1, 0, 10) for r in range(1, 8)]
    assert [sum(m.numel for m in batch) for batch in _rounds(moves, 8, 5)] == [35, 35]


def test_a_group_that_only_shifts_costs_one_move_a_pair_of_ranks() -> None:
    params = tuple(Parameter(torch.zeros(10)) for _ in range(20))
    old, new = FlatLayout(params, 2), FlatLayout(params[10:], 2)
    moves = plan_moves(old, new, new.params)
    assert moves == (SliceMove(1, 0, 0, 0, 50), SliceMove(1, 50, 1, 0, 50))
    assert bytes_sent(moves, 4) == 200


def test_local_moves_need_no_process_group() -> None:
    params = tuple(Parameter(torch.zeros(3)) for _ in range(3))
    old, new = FlatLayout(params, 1), FlatLayout((params[2], params[0]), 1)
    target = torch.zeros(6)
    moves = plan_moves(old, new, new.params)
    assert Exchange(moves, target.dtype, target.device, rank=0, world=1, group=None).run(torch.arange(9.0), target) is None
    assert target.tolist() == [6, 7, 8, 0, 1, 2]


@given(sizes=sizes, world=st.integers(1, 5), kept=st.data(), limit=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_derived_from_moves_once_and_as_a_filter_would(sizes: list[int], world: int, kept: st.DataObject, limit: int) -> None:
    params = [Parameter(torch.zeros(n)) for n in sizes]
    old = FlatLayout(tuple(params), world, 2 * world)
    new = FlatLayout(tuple(kept.draw(st.lists(st.sampled_from(params), min_size=1, unique_by=id))), world, 2 * world)
    moves = plan_moves(old, new, new.params)
    staying = [sum(m.numel for m in moves if m.source == m.target == rank) for rank in range(world)]
    assert moves.most_staying == max(staying)
    batches = list(_rounds([m for m in moves if m.source != m.target], world, limit))
    assert moves.rounds(world, limit) == batches
    for rank in range(world):
        for batch, (outgoing, incoming) in zip(batches, moves.rounds_of(rank, world, limit), strict=True):
            assert sorted(outgoing) == sorted(m for m in batch if m.source == rank)
            assert sorted(incoming) == sorted(m for m in batch if m.target == rank)
        held = [(p, s) for p in old.params for s in old.segments(p) if s.rank == rank]
        assert [(id(p), s) for p, s in old.local_segments(rank)] == [(id(p), s) for p, s in held]
    assert plan_moves(old, FlatLayout(new.params, world, 2 * world), new.params) is moves
    assert plan_moves(old, FlatLayout(new.params, world, 4 * world), new.params) is not moves
