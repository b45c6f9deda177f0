"""Memory's bandwidth is measured on memory that is not in a cache, without new memory and without a change of the state.

Background: a probe of 4 MiB lies in a GPU's L2 cache, whose bandwidth is several times that of its memory; a larger one would need memory
that a full device does not have at a freeze.
"""

from __future__ import annotations

import torch

from smartfrz_ds.backends.cost import _PARTS, PROBE_BYTES, _parts, measure_memory

CPU = torch.device("cpu")
ELEMENTS = PROBE_BYTES // 4


def test_the_parts_are_different_memory_of_the_state() -> None:
    state = [torch.zeros(3), torch.arange(2 * ELEMENTS + 5, dtype=torch.float32), torch.ones(ELEMENTS, 2, dtype=torch.bfloat16)]
    before = [t.clone() for t in state]
    parts = _parts(CPU, state)
    assert [p.nbytes for p in parts] == [PROBE_BYTES] * 3
    starts = {p.data_ptr() for p in parts}
    assert starts == {state[1].data_ptr(), state[1].data_ptr() + PROBE_BYTES, state[2].data_ptr()}
    memory, link = measure_memory(CPU, state)
    assert 0 < memory < float("inf") and link == float("inf")
    assert all(map(torch.equal, state, before))


def test_no_more_parts_than_a_cache_needs_and_none_of_another_device() -> None:
    assert len(_parts(CPU, [torch.empty((_PARTS + 9) * ELEMENTS)])) == _PARTS
    assert _parts(CPU, [torch.empty(ELEMENTS, device="meta"), torch.empty(2, ELEMENTS).T, torch.empty(ELEMENTS - 1)]) == []
    assert measure_memory(CPU)[0] > 0  # a small model: its state lies in the cache, as the probe does
