"""The sampler that keeps samples on their host: every sample once an epoch, none on two ranks, on its host in each epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from smartfrz_ds import HostSampler

TOPOLOGIES = st.lists(st.integers(0, 3), min_size=1, max_size=7)


def ranks_of(rows: int, hosts: list[int], epoch: int = 0, **options: Any) -> list[list[int]]:
    samplers = [HostSampler(range(rows), hosts=hosts, rank=rank, **options) for rank in range(len(hosts))]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)
    return [list(sampler) for sampler in samplers]


@given(TOPOLOGIES, st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_every_sample_once_an_epoch_on_its_host(hosts: list[int], more: int, drop: bool, shuffle: bool, seed: int, epoch: int) -> None:
    rows, world = len(hosts) + more, len(hosts)
    options: dict[str, Any] = {"drop_last": drop, "shuffle": shuffle, "seed": seed}
    dealt = ranks_of(rows, hosts, epoch, **options)
    # as many on each rank as DistributedSampler gives it
    assert {len(own) for own in dealt} == {rows // world if drop else -(-rows // world)}
    times = Counter(i for own in dealt for i in own)
    assert set(times) <= set(range(rows))
    if drop or rows % world == 0:
        assert set(times.values()) == {1}
    if not drop:
        assert set(times) == set(range(rows)) and sum(times.values()) < rows + world
    home = {i: hosts[rank] for rank, own in enumerate(dealt) for i in own}
    for later in (epoch + 1, epoch + 2):
        for rank, own in enumerate(ranks_of(rows, hosts, later, **options)):
            assert all(home.get(i, hosts[rank]) == hosts[rank] for i in own)
            home |= dict.fromkeys(own, hosts[rank])
    assert ranks_of(rows, hosts, epoch, **options) == dealt


def test_each_epoch_is_another_permutation_and_leaves_others_out() -> None:
    hosts = [0, 0, 1, 1]
    epochs = [ranks_of(43, hosts, epoch, drop_last=True) for epoch in range(6)]
    assert len({tuple(map(tuple, dealt)) for dealt in epochs}) == 6
    left_out = [set(range(43)) - {i for own in dealt for i in own} for dealt in epochs]
    assert all(len(x) == 3 for x in left_out) and len(set().union(*left_out)) > 3
    # on its host a sample changes ranks
    assert len({next(rank for rank, own in enumerate(dealt) if epochs[0][0][0] in own) for dealt in epochs}) == 2
    assert ranks_of(43, hosts, seed=1) != ranks_of(43, hosts)
    assert ranks_of(8, hosts, shuffle=False) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_shares_are_random_and_in_proportion_to_the_ranks() -> None:
    dealt = ranks_of(1000, [0, 1, 1, 1, 2])
    assert [len(own) for own in dealt] == [200] * 5
    assert 350 < sum(dealt[0]) / 200 < 650  # data sorted by class do not lie on one host


@given(TOPOLOGIES, st.integers(1, 5), st.integers(0, 60), st.booleans())
@settings(max_examples=100, deadline=None)
def test_accelerate_deals_out_the_same_samples(hosts: list[int], batch: int, more: int, drop: bool) -> None:
    """With a batch size, the order of all ranks; Accelerate gives every W-th batch to a rank."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    world = len(hosts)
    rows = world * (batch if drop else 1) + more
    own = ranks_of(rows, hosts, 3, batch_size=batch, drop_last=drop)
    assert all(x == own[0] for x in own)  # the same everywhere
    shards = []
    for rank in range(world):
        sampler = HostSampler(range(rows), hosts=hosts, rank=rank, batch_size=batch, drop_last=drop)
        sampler.set_epoch(3)
        shards.append(list(BatchSamplerShard(BatchSampler(sampler, batch, False), world, rank)))
    assert {len(x) for x in shards} == {len(own[0]) // world // batch}
    home: dict[int, int] = {}
    for rank, batches in enumerate(shards):
        for i in (i for one in batches for i in one):
            assert len(batches[0]) == batch and home.setdefault(i, hosts[rank]) == hosts[rank]
    assert drop or set(home) == set(range(rows))


def test_resumes_within_an_epoch() -> None:
    for batch, count in ((None, 3), (2, 4)):
        sampler = HostSampler(range(40), hosts=[0, 0, 1], rank=1, batch_size=batch)
        sampler.set_epoch(2)
        whole = list(sampler)
        sampler.set_epoch(2, start=count)
        assert list(sampler) == whole[count * (1 if batch is None else 3) :] and len(whole) == len(sampler)
        sampler.set_epoch(3)
        assert len(list(sampler)) == len(whole)


def test_works_in_a_loader_without_a_process_group() -> None:
    loader: DataLoader[int] = DataLoader(list(range(10)), batch_size=4, sampler=HostSampler(range(10)))  # type: ignore[arg-type]
    seen = [int(i) for batch in loader for i in batch]
    assert sorted(seen) == list(range(10)) and seen != sorted(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": [0, 0], "rank": 2}, "rank: got 2; allowed: an integer from 0 to 1"),
        ({"hosts": []}, "hosts: got 0 entries"),
        ({"hosts": [0] * 11, "rank": 0}, "dataset: got 10 samples for 11 ranks; allowed: at least 11"),
        ({"hosts": [0] * 4, "rank": 0, "batch_size": 3, "drop_last": True}, "allowed: at least 12"),
        ({"batch_size": 0}, "batch_size: got 0; allowed: an integer >= 1, or None"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HostSampler(range(10), **options)
    with pytest.raises(ValueError, match="start: got 11; allowed: a multiple of 1 from 0 to 10"):
        HostSampler(range(10)).set_epoch(0, start=11)
