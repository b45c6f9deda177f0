"""How much learning rate is still to come, against the scheduler itself running to the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR
from torch.optim import lr_scheduler as s
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_scheduler

from smartfrz_ds.signals.lr_forecast import RemainingLr, current_lr, forecast, total_steps_of

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, tuple[Make, int | None]] = {
    "lambda": (lambda o: s.LambdaLR(o, lambda t: 1 / (1 + t)), None),
    "cosine": (lambda o: s.CosineAnnealingLR(o, T_max=30), 30),
    "onecycle": (lambda o: s.OneCycleLR(o, max_lr=0.1, total_steps=40), 40),
    "sequential": (lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, total_iters=5), s.ExponentialLR(o, 0.9)], [5]), None),
    "warm-up and cosine": (lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, total_iters=5), s.CosineAnnealingLR(o, 35)], [5]), 40),
    "polynomial": (lambda o: s.PolynomialLR(o, 40), 40),
    "linear to zero": (lambda o: s.LinearLR(o, 1.0, 0.01, 40), 40),
    "warm-up alone": (lambda o: s.LinearLR(o, 0.1, total_iters=5), None),
    "hf stable": (lambda o: get_scheduler("warmup_stable_decay", o, 5, 40, scheduler_specific_kwargs={"num_decay_steps": 10}), 40),
    "hf linear": (lambda o: get_linear_schedule_with_warmup(o, 5, 40), 40),
    "hf cosine": (lambda o: get_cosine_schedule_with_warmup(o, 5, 40), 40),
    "ds decay": (lambda o: WarmupDecayLR(o, total_num_steps=40, warmup_max_lr=0.1, warmup_num_steps=5), 40),
    "ds cosine": (lambda o: WarmupCosineLR(o, total_num_steps=40, warmup_num_steps=5), 40),
}


def optimizer() -> torch.optim.Optimizer:
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    return torch.optim.SGD([{"params": [a], "lr": 0.05}, {"params": [b], "lr": 0.1}])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_forecast_is_what_happens(name: str) -> None:
    make, total = SCHEDULERS[name]
    opt = optimizer()
    scheduler = make(opt)
    assert total_steps_of(scheduler) == total
    for _ in range(7):
        opt.step()
        scheduler.step()
    state = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | list)}
    ahead = forecast(scheduler, 20)
    assert {k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | list)} == state, (
        "the forecast moved the scheduler"
    )
    happened = []
    for _ in range(20):
        happened.append(current_lr(opt))
        opt.step()
        scheduler.step()
    assert ahead == pytest.approx(happened, rel=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_remaining_is_the_sum_to_the_end_and_notices_a_change_by_hand() -> None:
    opt = optimizer()
    scheduler = get_linear_schedule_with_warmup(opt, 0, 40)
    remaining = RemainingLr(scheduler, 40)
    assert sum(remaining.ahead(0)) == pytest.approx(sum(0.1 * (40 - t) / 40 for t in range(40)))
    for _ in range(10):
        opt.step()
        scheduler.step()
    assert sum(remaining.ahead(10)) == pytest.approx(sum(0.1 * (40 - t) / 40 for t in range(10, 40)))
    scheduler.base_lrs = [0.5, 1.0]  # somebody turns the learning rate up tenfold
    opt.step()
    scheduler.step()
    assert sum(remaining.ahead(11)) == pytest.approx(sum(1.0 * (40 - t) / 40 for t in range(11, 40)))
    assert sum(remaining.ahead(40)) == sum(remaining.ahead(45)) == 0.0


def test_unknown_stays_unknown() -> None:
    assert total_steps_of(None) is None
    assert RemainingLr(None, 100).ahead(3) is None
    assert RemainingLr(s.LambdaLR(optimizer(), lambda t: 1.0), None).ahead(3) is None
