"""Mode `budget`: the plan against all plans there are, and whole runs of the policy on hand-made views."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.model.flops import chain_profile, step_flops
from smartfrz_ds.model.view import LayerInfo, View
from smartfrz_ds.policies.attention import AttentionPolicy
from smartfrz_ds.policies.budget import Budget
from smartfrz_ds.policies.budget_solver import freezing_times, remaining_cost

STEPS, INTERVAL, BLOCKS = 400, 10, 8


def rates(schedule: str) -> torch.Tensor:
    x = torch.arange(STEPS, dtype=torch.float64) / STEPS
    return {"constant": torch.ones_like(x), "cosine": 0.5 * (1 + torch.cos(math.pi * x)), "linear": 1 - x}[schedule]


@given(
    gain=st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.15]), min_size=1, max_size=3),
    weight=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    lr=st.lists(st.floats(0, 1), min_size=4, max_size=7),
    need=st.floats(0.0, 1.2),
)
@settings(max_examples=150, deadline=None)
def test_no_plan_that_saves_as_much_costs_less(gain: list[float], weight: list[float], lr: list[float], need: float) -> None:
    weight = weight[: len(gain)]
    k, cost = remaining_cost(torch.tensor(lr))
    assert k.tolist() == list(range(len(lr) + 1))
    times = freezing_times(gain, weight, k, cost, need)
    assert times == sorted(times, reverse=True)

    def saving(t: Any) -> float:
        return sum(g * x for g, x in zip(gain, t, strict=True))

    def loss(t: Any) -> float:
        return sum(w * float(cost[x]) for w, x in zip(weight, t, strict=True))

    if sum(gain) * len(lr) <= need:
        assert times == [len(lr) if need else 0] * len(gain)  # all that there is
        return
    assert saving(times) >= need - 1e-9
    every = [t for t in itertools.product(range(len(lr) + 1), repeat=len(gain)) if list(t) == sorted(t, reverse=True)]
    assert all(loss(t) >= loss(times) - 1e-4 for t in every if saving(t) >= saving(times) - 1e-9)


def test_equal_layers_freeze_together_and_a_still_front_earlier() -> None:
    k, cost = remaining_cost(rates("cosine"))
    together = freezing_times([0.05] * 6, [1.0] * 6, k, cost, 40.0)
    assert len(set(together)) == 1
    split = freezing_times([0.05] * 6, [0.2] * 3 + [1.0] * 3, k, cost, 40.0)
    assert split[0] == split[2] > together[0] > split[3] == split[5]
    # the back never freezes before the front, however still it is
    assert len(set(freezing_times([0.05] * 6, [1.0] * 3 + [0.2] * 3, k, cost, 40.0))) == 1


def run(
    share: float, schedule: str, p: Any, most: float = 0.9, total: int = STEPS, loss: Any = None
) -> tuple[float, list[tuple[int, tuple[str, ...]]], str]:
    """A whole run, judged every INTERVAL steps. p(step, block): probability; loss(learning rate spent).

    Gives the saved share, the freezes, the last note.
    """
    layers = (
        LayerInfo(name="embeddings", kind="embedding", numel=8),
        *(LayerInfo(name=f"block{i}", kind="block", numel=8) for i in range(BLOCKS)),
        LayerInfo(name="head", kind="head", numel=8),
    )
    profile = chain_profile([1.0] * len(layers))
    budget, lr = Budget(share, most), rates(schedule)
    frozen: list[str] = []
    freezes, full, done, note = [], 0.0, 0.0, ""
    for step in range(1, total + 1):
        full += step_flops(profile, ()).total
        done += step_flops(profile, [i for i, layer in enumerate(layers) if layer.name in frozen]).total
        if step % INTERVAL or step < 50 or step == total:
            continue
        view = View(
            step=step,
            total_steps=total,
            lr_spent=float(lr[:step].sum()),
            lr_remaining=float(lr[step:].sum()),
            lr_ahead=lr[step:],
            layers=layers,
            frozen=tuple(frozen),
            candidates=tuple(x.name for x in layers if x.kind != "head" and x.name not in frozen),
            windows={},
            window_size=30,
            profile=profile,
            flops_full=full,
            flops_done=done,
            metrics={} if loss is None else {"loss": loss(float(lr[:step].sum()))},
        )
        judged = {f"block{i}": p(step, i) for i in range(BLOCKS) if f"block{i}" not in frozen}
        decision = budget.decide(view, judged)
        assert set(decision.freeze) <= set(view.candidates)
        note = decision.note or note
        if decision.freeze:
            frozen += decision.freeze
            freezes.append((step, decision.freeze))
    return 1 - done / full, freezes, note


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4])
def test_the_budget_is_met(share: float, schedule: str) -> None:
    saved, freezes, _ = run(share, schedule, lambda step, i: 0.99 - 0.1 * i)
    assert saved == pytest.approx(share, abs=0.6 * INTERVAL / STEPS)
    order = [name for _, names in freezes for name in names]
    assert order == sorted(order, key=lambda n: -1 if n == "embeddings" else int(n[5:]))


def test_what_the_predictor_says_moves_the_layers_apart() -> None:
    _, alike, note = run(0.25, "cosine", lambda step, i: 0.5)
    assert len(alike) == 1 and "late" in note
    _, apart, note = run(0.25, "cosine", lambda step, i: 0.99 if i < 3 else 0.05)
    assert len(apart) > 1 and apart[0][0] < alike[0][0] < apart[-1][0]
    assert "block2" in apart[0][1] and "block3" not in apart[0][1]


def test_a_budget_out_of_reach_freezes_all_that_it_may_and_says_so() -> None:
    saved, freezes, note = run(0.6, "cosine", lambda step, i: 0.5, most=0.5)
    assert freezes == [(50, ("embeddings", *(f"block{i}" for i in range(4))))]  # 5 of 10 layers
    assert saved < 0.6 and "can no longer be saved" in note and f"at most {saved:.3g}" in note


def test_no_freeze_that_costs_more_than_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def falls(spent: float) -> float:  # most is learned at the start, so that fewer steps cost next to nothing
        return 0.5 + 2 * math.exp(-spent / 30)

    for loss, words in [(None, "no loss was reported"), (falls, "worth freezing")]:
        saved, _, note = run(0.3, "cosine", lambda step, i: 0.0, loss=loss)
        assert saved == pytest.approx(0.3, abs=0.02) and (words in note or "budget: reached" in note)
    monkeypatch.setattr("smartfrz_ds.predictor.loss_curve.FREEZING", 1e4)  # freezing is always worse
    saved, freezes, note = run(0.3, "cosine", lambda step, i: 0.0, loss=falls)
    assert saved == 0.0 and freezes == []
    assert (
        "nothing more freezes" in note and "0.000 of the budget of 0.3 are worth freezing" in note and "better saved by fewer steps" in note
    )
    monkeypatch.setattr("smartfrz_ds.predictor.loss_curve.FREEZING", 4.0)  # the same freeze is worth it late, not early
    some, _, note = run(0.4, "linear", lambda step, i: 0.0, loss=lambda spent: 3 - spent / 200)
    assert 0.02 < some < 0.38 and "better saved by fewer steps" in note


def test_the_loss_curve_is_part_of_the_state() -> None:
    budget, other = Budget(0.2, 0.5), Budget(0.2, 0.5)
    budget._last, budget._spent, budget._points = 70, 3.5, [[1.0, 2.0], [3.0, 1.5]]
    other.load_state_dict(budget.state_dict())
    assert (other._last, other._spent, other._points) == (70, 3.5, [[1.0, 2.0], [3.0, 1.5]])
    other.load_state_dict({"last": 80})  # a checkpoint of an earlier version
    assert other._last == 80 and other._points == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "budget", "budget": 0.7}, "smartfrz.attention.budget: got 0.7"),
        ({"budget": 0}, "smartfrz.attention.budget: got 0"),
        ({"mode": "sometimes"}, "smartfrz.attention.mode"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FreezeConfig.load({"attention": settings})


def test_an_unknown_length_is_refused_at_start() -> None:
    assert "total_steps" in AttentionPolicy(mode="budget", budget=0.3).needs
    assert "total_steps" not in AttentionPolicy().needs
