"""How much learning rate is still to come, against the scheduler itself running to the end."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.lr_schedules import OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from reference.oracle import Net, data, loss_of
from torch import Tensor
from torch.optim import lr_scheduler as s
from transformers import get_linear_schedule_with_warmup, get_scheduler

import smartfrz_ds
from smartfrz_ds.integrations.accelerate import PerStep
from smartfrz_ds.signals import lr_forecast
from smartfrz_ds.signals.lr_curves import MAX_LAMBDA, rates_ahead
from smartfrz_ds.signals.lr_forecast import RemainingLr, current_lr, forecast, total_steps_of

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, tuple[Make, int | None]] = {
    "lambda": (lambda o: s.LambdaLR(o, lambda t: 1 / (1 + t)), None),
    "lambdas": (lambda o: s.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (3 + t)]), None),
    "multiplicative": (lambda o: s.MultiplicativeLR(o, lambda t: 1 - 1 / (2 + t)), None),
    "step": (lambda o: s.StepLR(o, 6, 0.3), None),
    "milestones": (lambda o: s.MultiStepLR(o, [3, 9, 9, 21], 0.7), None),
    "constant": (lambda o: s.ConstantLR(o, 0.3, 11), None),
    "exponential": (lambda o: s.ExponentialLR(o, 0.93), None),
    "cosine": (lambda o: s.CosineAnnealingLR(o, T_max=30), 30),
    "cosine above a minimum": (lambda o: s.CosineAnnealingLR(o, T_max=13, eta_min=0.003), 13),
    "onecycle": (lambda o: s.OneCycleLR(o, max_lr=0.1, total_steps=80), 80),
    "onecycle of three": (
        lambda o: s.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=80, three_phase=True, anneal_strategy="linear", cycle_momentum=False),
        80,
    ),
    "sequential": (lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, total_iters=5), s.ExponentialLR(o, 0.9)], [5]), None),
    "warm-up and cosine": (lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, total_iters=5), s.CosineAnnealingLR(o, 35)], [5]), 40),
    "sequence of all": (
        lambda o: s.SequentialLR(
            o,
            [
                s.LambdaLR(o, lambda t: t / 4),
                s.StepLR(o, 3, 0.5),
                s.CosineAnnealingLR(o, 9, 1e-3),
                s.PolynomialLR(o, 20, 2.0),
                s.MultiplicativeLR(o, lambda t: 0.97),
                s.ConstantLR(o, 0.4, 4),
                s.MultiStepLR(o, [2, 4], 0.2),
            ],
            [4, 11, 24, 37, 44, 52],
        ),
        None,
    ),
    "chained": (lambda o: s.ChainedScheduler([s.LinearLR(o, 0.2, total_iters=7), s.ExponentialLR(o, 0.9)]), None),
    "chained with a cosine": (
        lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.5, 8), s.CosineAnnealingLR(o, 21, 0.002), s.StepLR(o, 10, 0.5)]),
        None,
    ),
    "polynomial": (lambda o: s.PolynomialLR(o, 40), 40),
    "polynomial of the second power": (lambda o: s.PolynomialLR(o, 40, 1.7), 40),
    "linear to zero": (lambda o: s.LinearLR(o, 1.0, 0.01, 40), 40),
    "warm-up alone": (lambda o: s.LinearLR(o, 0.1, total_iters=5), None),
    "hf stable": (lambda o: get_scheduler("warmup_stable_decay", o, 5, 40, scheduler_specific_kwargs={"num_decay_steps": 10}), 40),
    **{
        f"hf {name}": ((lambda o, name=name: get_scheduler(name, o, num_warmup_steps=5, num_training_steps=40, **_MORE.get(name, {}))), 40)
        for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr")
    },
    **{
        f"hf {name}": ((lambda o, name=name: get_scheduler(name, o, num_warmup_steps=5)), None)
        for name in ("constant", "constant_with_warmup", "inverse_sqrt")
    },
    "ds warm-up": (lambda o: WarmupLR(o, warmup_min_lr=0.01, warmup_max_lr=0.1, warmup_num_steps=9), None),
    "ds linear warm-up": (lambda o: WarmupLR(o, warmup_max_lr=[0.1, 0.3], warmup_num_steps=30, warmup_type="linear"), None),
    "ds decay": (lambda o: WarmupDecayLR(o, total_num_steps=40, warmup_max_lr=0.1, warmup_num_steps=5), 40),
    "ds linear decay": (
        lambda o: WarmupDecayLR(o, total_num_steps=40, warmup_max_lr=0.1, warmup_num_steps=12, warmup_type="linear"),
        40,
    ),
    "ds cosine": (lambda o: WarmupCosineLR(o, total_num_steps=40, warmup_num_steps=5), 40),
    "ds linear cosine": (
        lambda o: WarmupCosineLR(o, total_num_steps=40, warmup_min_ratio=0.1, warmup_num_steps=9, warmup_type="linear"),
        40,
    ),
    "ds cycle": (lambda o: OneCycle(o, 0.01, 0.1, cycle_first_step_size=11, cycle_second_step_size=17), None),
    "ds cycle that decays": (
        lambda o: OneCycle(o, 0.01, 0.1, 0.3, 10, decay_step_size=4, cycle_first_stair_count=3, cycle_momentum=False),
        None,
    ),
    "per step of Accelerate": (lambda o: PerStep(s.CosineAnnealingLR(o, 300), 3), 100),
}
_MORE: dict[str, Any] = {
    "cosine_with_min_lr": {"scheduler_specific_kwargs": {"min_lr": 0.001}},
    "cosine_warmup_with_min_lr": {"scheduler_specific_kwargs": {"min_lr": 0.001}},
}


def optimizer() -> torch.optim.Optimizer:
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    return torch.optim.SGD([{"params": [a], "lr": 0.05}, {"params": [b], "lr": 0.1}])


def numbers_of(item: Any) -> Any:
    """Everything in a scheduler's state that a step changes."""
    return {
        k: copy.deepcopy(v) for k, v in vars(item).items() if isinstance(v, int | float | list) and k not in ("_schedulers", "lr_lambdas")
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("before", [0, 7, 23])
def test_a_formula_equals_the_stepped_schedule_bit_for_bit(name: str, before: int) -> None:
    make, total = SCHEDULERS[name]
    opt = optimizer()
    scheduler = make(opt)
    assert total_steps_of(scheduler) == total
    for _ in range(before):
        opt.step()
        scheduler.step()
    state = numbers_of(scheduler)
    ahead, stepped = rates_ahead(scheduler, 55), forecast(scheduler, 55)
    assert numbers_of(scheduler) == state, "the forecast moved the scheduler"
    happened = []
    for _ in range(55):
        happened.append(current_lr(opt))
        opt.step()
        scheduler.step()
    assert stepped == happened
    assert ahead is not None and ahead.tolist() == happened, np.abs(ahead - happened).max()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_remaining_is_the_sum_to_the_end_and_notices_a_change_by_hand() -> None:
    opt = optimizer()
    scheduler = get_linear_schedule_with_warmup(opt, 0, 40)
    remaining = RemainingLr(scheduler, 40)
    assert remaining.remaining(0) == pytest.approx(sum(0.1 * (40 - t) / 40 for t in range(40)))
    for _ in range(10):
        opt.step()
        scheduler.step()
    assert remaining.remaining(10) == pytest.approx(sum(0.1 * (40 - t) / 40 for t in range(10, 40)))
    scheduler.base_lrs = [0.5, 1.0]  # the user turns the learning rate up tenfold
    opt.step()
    scheduler.step()
    ahead = remaining.ahead(11)
    assert ahead is not None and len(ahead) == 29 and sum(ahead) == pytest.approx(sum(1.0 * (40 - t) / 40 for t in range(11, 40)))
    for step in (40, 45):
        ahead = remaining.ahead(step)
        assert ahead is not None and len(ahead) == 0 and remaining.remaining(step) == 0.0


def test_unknown_stays_unknown() -> None:
    assert total_steps_of(None) is None
    assert RemainingLr(None, 100).ahead(3) is RemainingLr(None, 100).remaining(3) is None
    assert RemainingLr(s.LambdaLR(optimizer(), lambda t: 1.0), None).ahead(3) is None


class Counted(s.LRScheduler):
    """A scheduler of the user's own. Counts the steps of all copies."""

    steps = 0

    def get_lr(self) -> list[float | Tensor]:
        return [base * 0.999**self.last_epoch for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        Counted.steps += 1
        super().step(epoch)


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "steps", 0)
    monkeypatch.setattr(lr_forecast, "STEPS_PER_STAGE", 100)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("stepping")
def test_a_scheduler_without_a_formula_is_stepped_a_bounded_number_of_times() -> None:
    """It is unknown until the copy has reached the end; then it is exact, and no stage takes another step."""
    opt = optimizer()
    scheduler = Counted(opt)
    assert rates_ahead(scheduler, 10) is None
    remaining, seen = RemainingLr(scheduler, 250), []
    Counted.steps = 0
    for step in range(8):
        before = Counted.steps
        ahead = remaining.ahead(step)
        seen.append((Counted.steps - before, ahead is not None))
        if ahead is not None:
            assert ahead.tolist() == pytest.approx([0.1 * 0.999**t for t in range(step, 250)], rel=1e-15)
        opt.step()
        scheduler.step()
    assert seen == [(100, False), (100, False), (50, True), *[(0, True)] * 5]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("stepping")
@pytest.mark.parametrize(("off", "again"), [(1e-9, False), (1e-7, False), (1e-5, True)])
def test_a_small_deviation_needs_no_new_forecast(off: float, again: bool) -> None:
    opt = optimizer()
    scheduler = Counted(opt)
    remaining = RemainingLr(scheduler, 90)
    assert remaining.ahead(0) is not None
    Counted.steps = 0
    opt.step()
    scheduler.step()
    for group in opt.param_groups:
        group["lr"] *= 1 + off
    before = Counted.steps
    assert remaining.ahead(1) is not None
    assert (Counted.steps > before) == again


def test_a_user_lambda_of_a_long_run_is_called_a_bounded_number_of_times() -> None:
    calls = []

    def rate(t: int) -> float:
        calls.append(t)
        return math.cos(t / 300_000) if t < 400_000 else 0.2

    scheduler = s.LambdaLR(optimizer(), rate)
    calls.clear()
    ahead = rates_ahead(scheduler, 300_001)
    assert ahead is not None and len(ahead) == 300_001 and len(calls) == MAX_LAMBDA
    exact = 0.1 * np.cos(np.arange(300_001) / 300_000)
    assert np.abs(ahead - exact).max() < 1e-11  # a linear interpolation over 6 steps
    assert ahead[0] == exact[0] and ahead[-1] == pytest.approx(exact[-1], rel=1e-15)


def test_groups_that_differ_are_all_in_the_forecast() -> None:
    """The highest rate changes from one group to the other."""
    opt = optimizer()
    scheduler = s.LambdaLR(opt, [lambda t: 1.0 + t / 10, lambda t: 1.0 / (1 + t)])
    ahead = rates_ahead(scheduler, 30)
    assert ahead is not None
    assert ahead.tolist() == [max(0.05 * (1.0 + t / 10), 0.1 * (1.0 / (1 + t))) for t in range(30)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_subclass_is_not_taken_for_its_base() -> None:
    class Halved(s.CosineAnnealingLR):
        def get_lr(self) -> list[float | Tensor]:
            return [rate / 2 for rate in super().get_lr()]

    assert rates_ahead(Halved(optimizer(), 30), 20) is None
    both = s.SequentialLR(opt := optimizer(), [s.LinearLR(opt), Halved(opt, 30)], [4])
    assert rates_ahead(both, 20) is None and rates_ahead(both, 4) is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_one_cycle_that_ends_before_the_run_is_unknown() -> None:
    remaining = RemainingLr(s.OneCycleLR(optimizer(), 0.1, total_steps=20), 40)
    with pytest.warns(UserWarning, match="cannot run OneCycleLR ahead"):
        assert remaining.ahead(0) is None
    assert remaining.ahead(1) is None


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
