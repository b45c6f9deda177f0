"""The tables of gradient partitions of ZeRO-1/2, against DeepSpeed's own methods, which look at each parameter for each partition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout, padded_layout
from smartfrz_ds.backends.deepspeed.zero12 import gradient_tables

NOTED = (
    "param_to_partition_ids",
    "total_grads_in_partition",
    "is_grad_computed",
    "grad_partition_insertion_offset",
    "grad_start_offset",
    "first_param_index_in_partition",
)


def by_deepspeed(layout: FlatLayout) -> tuple[dict[int, int], dict[str, Any]]:
    """The numbers of the parameters, and what the optimizer's methods note, called as its constructor calls them."""
    zero: Any = object.__new__(DeepSpeedZeroOptimizer)
    zero.param_id = {id(p): 7 + k for k, p in enumerate(layout.params)}
    zero.partition_size, zero.round_robin_bit16_padding = [layout.partition_size], [list(layout.padding)]
    for name in NOTED:
        setattr(zero, name, {0: {}})
    for partition in range(layout.world):
        for name in ("is_grad_computed", "grad_partition_insertion_offset", "grad_start_offset"):
            getattr(zero, name)[0][partition] = {}
        zero.total_grads_in_partition[0][partition] = 0
        zero.initialize_gradient_partition(0, layout.params, partition)
        zero.first_param_index_in_partition[0][partition] = zero.get_first_param_index(0, layout.params, partition)
    return zero.param_id, {name: getattr(zero, name)[0] for name in NOTED}


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9), world=st.integers(1, 9), aligned=st.booleans())
@settings(max_examples=200, deadline=None)
def test_tables_are_those_of_deepspeed(sizes: list[int], world: int, aligned: bool) -> None:
    layout = padded_layout([Parameter(torch.zeros(n)) for n in sizes], world, 2, aligned=aligned)
    if not layout.numel:
        return
    ids, expected = by_deepspeed(layout)
    found = gradient_tables(layout, ids)
    for name in NOTED:
        assert found[name] == expected[name], name
        assert list(found[name]) == list(expected[name]), name
    assert found["is_partition_reduced"] == dict.fromkeys(range(world), False)


@pytest.mark.parametrize("world", [64, 128])
def test_one_step_for_each_piece(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Background: with 1024 partitions and 700 parameters, DeepSpeed's loops took a second of every freeze."""
    params = [Parameter(torch.empty(100, device="meta")) for _ in range(50)]
    layout = padded_layout(params, world, 2, aligned=False)
    asked = []
    segments = FlatLayout.segments
    monkeypatch.setattr(FlatLayout, "segments", lambda self, param: asked.append(id(param)) or segments(self, param))
    tables = gradient_tables(layout, {id(p): k for k, p in enumerate(params)})
    assert asked == [id(p) for p in params]
    assert sum(tables["total_grads_in_partition"].values()) <= len(params) + world
