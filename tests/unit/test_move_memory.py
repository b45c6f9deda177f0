"""What a move of layers between pipeline stages is predicted to hold."""

from __future__ import annotations

import torch

from smartfrz_ds.backends.deepspeed.flat.partition import STAGING_BYTES
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.backends.pipeline.parcels import EntryBytes, memory_of_move

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SMALL, LARGE = EntryBytes(weights=100, state=40), EntryBytes(weights=10 * STAGING_BYTES, state=0)


def test_what_leaves_stays_until_the_end_and_its_state_waits_on_the_host() -> None:
    assert memory_of_move({1: [SMALL]}, {}, GPU) == MemoryNeed(device=100 + 140, host=2 * 40)


def test_what_arrives_has_room_before_it_is_sent_and_its_state_comes_to_the_host_first() -> None:
    assert memory_of_move({}, {0: [SMALL]}, GPU) == MemoryNeed(device=140 + 140, host=40)


def test_staging_is_bounded_for_each_stage_that_takes_part() -> None:
    need = memory_of_move({1: [LARGE, LARGE], 2: [LARGE]}, {0: [LARGE]}, GPU)
    assert need == MemoryNeed(device=4 * LARGE.weights + 3 * STAGING_BYTES)


def test_on_a_cpu_all_of_it_is_on_the_host() -> None:
    one, other = (memory_of_move({1: [SMALL]}, {0: [LARGE]}, device) for device in (GPU, CPU))
    assert other == MemoryNeed(host=one.device + one.host)


def test_a_stage_that_takes_no_part_needs_nothing() -> None:
    assert memory_of_move({}, {}, GPU) == MemoryNeed()
