"""Which weights are sampled: fixed, spread over the layer, whatever its size. The values themselves: test_scenarios.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartfrz_ds.signals.history import History
from smartfrz_ds.signals.snapshots import sample_indices


def draw(numel: int, size: int, seed: int = 0) -> torch.Tensor:
    return sample_indices(numel, size, torch.Generator().manual_seed(seed))


@given(numel=st.integers(1, 10**12), size=st.integers(1, 300), seed=st.integers(0, 10))
def test_indices_are_in_range_sorted_and_distinct_where_they_can_be(numel: int, size: int, seed: int) -> None:
    chosen = draw(numel, size, seed)
    assert chosen.shape == (size,) and chosen.dtype == torch.int64
    assert chosen.min() >= 0 and chosen.max() < numel
    if numel >= size:
        assert (chosen.diff() > 0).all()
    else:
        assert set(chosen.tolist()) == set(range(numel))  # a small layer is taken whole, repeated
    assert torch.equal(chosen, draw(numel, size, seed))


def test_the_whole_layer_is_covered() -> None:
    """One index from each of the strata: no part of a large layer is left out."""
    chosen = draw(10**9, 1000)
    assert torch.equal(chosen // 10**6, torch.arange(1000))
    assert not torch.equal(chosen, draw(10**9, 1000, seed=1))


def test_history_keeps_a_window_and_what_a_frozen_layer_had() -> None:
    history = History(3)
    for step in range(1, 6):
        names = ["front", "back"] if step < 4 else ["back"]
        history.record(step, 0.1 * step, {n: torch.full((2,), float(step)) for n in names})
    windows = history.windows()
    assert windows["front"].steps.tolist() == [1, 2, 3] and windows["back"].steps.tolist() == [3, 4, 5]
    assert windows["back"].weights[:, 0].tolist() == [3, 4, 5] and windows["back"].lr_spent.tolist() == pytest.approx([0.3, 0.4, 0.5])
    other = History(3)
    other.load_state_dict(history.state_dict())
    assert torch.equal(other.windows()["front"].weights, windows["front"].weights)
    history.forget(["front"])
    assert "front" not in history.windows()
