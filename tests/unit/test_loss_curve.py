"""The loss curve of mode `budget`: known curves, noise, flat and short ones, and what follows from them for the plan."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from smartfrz_ds.predictor.loss_curve import FREEZING, MIN_POINTS, SHORTER, LossCurve, cost_of_fewer_steps, cost_of_freezing, fit_loss_curve

TOTAL = 100.0
SPENT = [2.0 + 4 * i for i in range(13)]  # the first half of the run


def points(curve: Callable[[float], float]) -> list[float]:
    return [curve(s) for s in SPENT]


@pytest.mark.parametrize(
    "curve",
    [LossCurve(floor=0.5, height=2.0, scale=20.0, power=math.inf), LossCurve(floor=1.0, height=3.0, scale=5.0, power=0.5)],
    ids=["exponential", "power law"],
)
def test_a_known_curve_is_extrapolated(curve: LossCurve) -> None:
    found = fit_loss_curve(SPENT, points(curve.at))
    assert found is not None
    assert found.at(TOTAL) == pytest.approx(curve.at(TOTAL), rel=0.03)
    expected = SHORTER * (curve.at(70) / curve.at(100) - 1)
    assert cost_of_fewer_steps(found, TOTAL, 0.3) == pytest.approx(expected, abs=0.02)
    assert cost_of_fewer_steps(found, TOTAL, 0.0) == 0.0
    # half of the layers at half of the run, none converged
    left = (curve.at(50) - curve.at(100)) / curve.at(100)
    assert cost_of_freezing(found, TOTAL, [50.0] * 4, [None, 0.0, 0.0, 0.0], 8) == pytest.approx(FREEZING * left / 2, abs=0.02)


def test_a_flat_curve_says_that_nothing_costs_anything() -> None:
    for losses in ([1.3] * len(SPENT), [1.0 + 0.01 * i for i in range(len(SPENT))]):  # flat, and rising
        found = fit_loss_curve(SPENT, losses)
        assert found is not None
        assert found.height == pytest.approx(0.0, abs=1e-9)
        assert cost_of_fewer_steps(found, TOTAL, 0.4) == pytest.approx(0.0, abs=1e-9)
        assert cost_of_freezing(found, TOTAL, [50.0], [0.0], 1) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_an_outlier_change_little(seed: int) -> None:
    curve = LossCurve(floor=0.5, height=2.0, scale=25.0, power=math.inf)
    noise = 0.02 * torch.randn(len(SPENT), generator=torch.Generator().manual_seed(seed))
    losses = [y + n for y, n in zip(points(curve.at), noise.tolist(), strict=True)]
    losses[6] += 5.0
    found = fit_loss_curve(SPENT, losses)
    assert found is not None
    assert all(found.at(s) == pytest.approx(curve.at(s), abs=0.08) for s in SPENT)
    assert found.at(TOTAL) == pytest.approx(curve.at(TOTAL), abs=0.25)


def test_no_curve_without_enough_to_fit() -> None:
    assert fit_loss_curve(SPENT[: MIN_POINTS - 1], [3.0, 2.0, 1.5, 1.2][: MIN_POINTS - 1]) is None
    assert fit_loss_curve(SPENT, [1.0] * 12 + [math.nan]) is None
    assert fit_loss_curve([0.0] * 6, [1.0] * 6) is None
    assert fit_loss_curve(SPENT[:MIN_POINTS], [3.0, 2.0, 1.5, 1.2, 1.1]) is not None


def test_what_has_converged_costs_nothing() -> None:
    curve = LossCurve(floor=0.5, height=2.0, scale=25.0, power=math.inf)
    costs = [cost_of_freezing(curve, TOTAL, [30.0], [p], 4) for p in (1.0, 0.9, 0.5, 0.0)]
    assert costs[0] == 0.0 and costs == sorted(costs) and costs[1] < costs[3]
    assert cost_of_freezing(curve, TOTAL, [90.0], [0.5], 4) < cost_of_freezing(curve, TOTAL, [30.0], [0.5], 4)
