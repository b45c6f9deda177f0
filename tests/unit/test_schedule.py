"""How much learning rate is still to come, against the scheduler itself running to the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR
from reference.oracle import Net, data, loss_of
from torch.optim import lr_scheduler as s
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_scheduler

import smartfrz_ds
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


# --- a scheduler that counts epochs -------------------------------------------------------------------------------------------------


def run_with(scheduler_of: Make, moves_every: int, steps: int, **settings: Any) -> tuple[Any, list[str]]:
    """The controller after the run, and the warnings that it raised."""
    model = Net()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = scheduler_of(opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller = smartfrz_ds.attach_torch(model, opt, settings, scheduler=scheduler)
        for step in range(steps):
            opt.zero_grad()
            loss_of(model, *data(step, 0, 0), "fp32").backward()
            opt.step()
            if (step + 1) % moves_every == 0:
                scheduler.step()
    return controller, [str(w.message) for w in caught if str(w.message).startswith("smartfrz")]


def epochs(opt: torch.optim.Optimizer) -> Any:
    return s.CosineAnnealingLR(opt, T_max=20)


def test_a_scheduler_that_counts_epochs_is_not_the_length_of_the_run() -> None:
    """Background: 20 epochs of 50 steps were taken for a run of 20 steps; most of the model froze within 25 of its 1,000 steps."""
    controller, told = run_with(epochs, 50, 90)
    assert controller.frozen == () and controller.total_steps is None
    assert (controller.intervals.warmup_steps, controller.intervals.snapshot_interval, controller.intervals.freeze_interval) == (
        100,
        10,
        50,
    )
    assert len(told) == 1 and "the scheduler CosineAnnealingLR does not move with each optimizer step" in told[0]
    assert "its length, 20, is not used" in told[0] and "Set smartfrz.total_steps to" in told[0]
    assert [event.message for event in controller.report().events if event.kind == "warning"] == [told[0].removeprefix("smartfrz: ")]


def test_a_policy_that_needs_the_length_freezes_nothing_then() -> None:
    controller, told = run_with(epochs, 50, 30, policy="linear")
    assert controller.frozen == ()
    assert len(told) == 1 and "From now on nothing freezes: smartfrz.linear.start_step: got null" in told[0]
    numbers = {"policy": "linear", "linear": {"start_step": 4, "end_step": 40}, "warmup_steps": 0, "freeze_interval": 4, "cooldown": 0}
    controller, told = run_with(epochs, 50, 50, **numbers)
    assert len(told) == 1 and len(controller.frozen) >= 3


def test_a_length_that_the_user_set_stays() -> None:
    controller, told = run_with(epochs, 50, 60, policy="linear", total_steps=100)
    assert controller.total_steps == 100 and controller.frozen
    assert len(told) == 1 and told[0].endswith("its future learning rates are not used")


def test_a_scheduler_that_moves_with_the_steps_is_believed() -> None:
    controller, told = run_with(epochs, 1, 19, policy="linear")
    assert controller.total_steps == 20 and controller.frozen and told == []


def test_without_a_length_nothing_is_said() -> None:
    controller, told = run_with(lambda o: s.StepLR(o, 30), 50, 110)
    assert controller.total_steps is None and told == []
