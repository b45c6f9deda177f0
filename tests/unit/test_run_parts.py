"""The parts of a run: one list of observers, the transaction of a change, the state that a checkpoint keeps, and deprecated names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference.ones import step
from reference.oracle import Net

import smartfrz_ds
from smartfrz_ds.model.run_state import RunState
from smartfrz_ds.runtime.observers.protocol import Listeners, StepObserver

HOOKS = [name for name in vars(StepObserver) if not name.startswith("_")]


class Spy(StepObserver):
    """Notes which of its methods are called."""

    def __init__(self) -> None:
        self.called: list[str] = []


def _noting(name: str) -> Any:
    def call(self: Spy, *args: Any) -> Any:
        self.called.append(name)
        return getattr(StepObserver, name)(self, *args)

    return call


for _name in HOOKS:
    setattr(Spy, _name, _noting(_name))


def attach(**more: Any) -> tuple[Any, Any, Any]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "order": "any"}, **more)


@pytest.fixture
def run() -> Iterator[tuple[Any, Any, Any]]:
    model, optimizer, controller = attach()
    yield model, optimizer, controller
    controller.detach()


def test_the_order_of_the_observers() -> None:
    section = {"policy": "linear", "total_steps": 100, "guard": {"metric": "loss"}}
    model = Net()
    controller = smartfrz_ds.attach_torch(model, torch.optim.SGD(model.parameters(), lr=0.01), section)
    assert [type(observer).__name__ for observer in controller._observers] == [
        *("StatusLines", "Journal", "OrderWatch", "RecomputeWatch", "FlagWatch", "EngineLayout", "FlopCount"),
        *("GradientWatch", "PolicyStage", "GuardedRun", "KeptState", "Recording", "Readers"),
    ]
    controller.detach()


def test_every_event_of_a_run_reaches_the_observers(run: tuple[Any, Any, Any]) -> None:
    _, optimizer, controller = run
    spy = Spy()
    controller._observers.append(spy)
    controller._every_step = Listeners(controller._observers)  # made once, when the run is assembled

    def heard() -> list[str]:
        called, spy.called = spy.called, []
        return called

    controller.record_loss(torch.tensor(1.0))
    controller.observe(loss=1.0)
    assert heard() == ["record_loss", "observe"]
    step(optimizer)
    assert heard() == ["before_step", "after_step", "step_ended"]
    controller.step_skipped()
    assert heard() == ["step_skipped"]
    controller.freeze(["blocks.0"])
    assert heard() == ["before_change", "on_layout_change", "after_change"]
    controller.freeze_state.sync()
    state = controller.state_dict()
    assert heard() == ["sync_for_checkpoint", "state_dict"]
    controller.load_state_dict(state)
    assert heard() == ["load_state_dict"]
    controller.freeze_state.reset(7)
    assert heard() == ["reset"] and controller.step == 7 and controller.frozen == ("blocks.0",)
    controller.detach()
    assert heard() == ["remove"]


def test_what_prepare_refuses_changes_nothing_and_tells_nobody(run: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, controller = run
    step(optimizer)
    spy = Spy()
    controller._observers.append(spy)
    controller._every_step = Listeners(controller._observers)  # made once, when the run is assembled
    before = {name: p.clone() for name, p in model.named_parameters()}

    def refuse(freeze: Any, thaw: Any) -> None:
        raise ValueError("no room")

    monkeypatch.setattr(controller.backend, "check", refuse)
    monkeypatch.setattr(controller.backend, "change", None)  # not reached
    with pytest.raises(ValueError, match="no room"):
        controller.freeze(["blocks.0"])
    assert controller.frozen == () and not controller.backend.frozen and spy.called == []
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_the_state_that_a_checkpoint_keeps() -> None:
    state = RunState(("a", "b", "c"), lr=0.5)
    state.count_step(0.25)
    state.count_step(0.125)
    state.frozen, state.frozen_at, state.cooldown = {"b", "a"}, {"a": 1, "b": 2}, 3
    saved = state.state_dict()
    assert saved == {
        "step": 2,
        "layers": ["a", "b", "c"],
        "frozen": ["a", "b"],
        "frozen_at": {"a": 1, "b": 2},
        "lr_spent": 0.75,
        "cooldown": 3,
    }
    other = RunState(("a", "b", "c"), frozen={"a", "b"})
    other.load_state_dict(saved, 0.125)
    assert other == state
    other.reset(9, 1.0)
    assert (other.step, other.lr, other.lr_spent, other.cooldown, other.frozen_at) == (9, 1.0, 0.0, 0, {})


@pytest.mark.parametrize(("argument", "call"), [("defer_policy", "set_schedule"), ("later", "learn")])
def test_a_schedule_that_comes_later(argument: str, call: str) -> None:
    _, optimizer, controller = attach(**{argument: True})
    assert controller._policy_stage.deferred
    getattr(controller, call)(total_steps=20)
    assert not controller._policy_stage.deferred and controller.total_steps == 20
    step(optimizer)
    assert controller.total_steps == 20
    controller.release()
    controller.detach()
    assert controller.released
