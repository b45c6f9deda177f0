"""Setting an attribute of a controller that does nothing raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.oracle import Net

import smartfrz_ds


@pytest.fixture
def controller() -> Any:
    model = Net()
    made = smartfrz_ds.attach_torch(model, torch.optim.AdamW(model.parameters()), {"policy": "linear", "total_steps": 100, "order": "any"})
    yield made
    made.release()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("policy", "set smartfrz.policy in the config; while training, freeze([…]) and thaw([…])"),
        ("max_frozen_fraction", "set smartfrz.max_frozen_fraction in the config"),
        ("freeze_interval", "set smartfrz.freeze_interval in the config"),
        ("order", "set smartfrz.order in the config"),
        ("warmup_steps", "set smartfrz.warmup_steps in the config"),
        ("log_path", "set smartfrz.log_path in the config"),
        ("config", 'change the "smartfrz" section before it'),
        ("frozen", "call freeze([…]) or thaw([…])"),
        ("layers", "set smartfrz.layers in the config"),
        ("total_steps", "set_schedule(total_steps=…)"),
        ("metrics", "call observe(name=value)"),
        ("backend", "it is read-only"),
        ("step", "it is read-only"),
        ("polcy", "there is no such attribute; did you mean smartfrz.policy"),
        ("nonsense", "there is no such attribute"),
    ],
)
def test_it_says_what_to_do_instead(controller: Any, name: str, words: str) -> None:
    before = vars(controller).copy()
    with pytest.raises(AttributeError) as error:
        setattr(controller, name, None)
    assert f"controller.{name} can't be set, as that would do nothing: " in str(error.value) and words in str(error.value)
    assert vars(controller) == before


def test_settings_cannot_be_changed_inside_either(controller: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        controller.config.max_frozen_fraction = 0.1


def test_what_does_something_can_be_set(controller: Any) -> None:
    controller.freeze(["blocks.1"])
    controller.last_checkpoint = "somewhere"
    controller.restore_flags = lambda: None  # a method that a test or a subclass replaces
    assert controller.frozen == ("blocks.1",)


def test_a_length_that_comes_later_is_learnt() -> None:
    model = Net()
    made = smartfrz_ds.attach_torch(model, torch.optim.AdamW(model.parameters()), {"policy": "linear"}, later=True)
    with pytest.raises(AttributeError, match=r"set_schedule\(total_steps=…\)"):
        made.total_steps = 50
    made.learn(total_steps=50)
    assert made.total_steps == 50
    made.release()


@pytest.mark.parametrize("call", ["freeze", "thaw"])
def test_a_released_controller_freezes_nothing(call: str) -> None:
    """It used to switch the model's flags all the same, in a run that trains on without it."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    made = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "order": "any"})
    made.freeze(["blocks.0"])
    made.release()
    with pytest.raises(RuntimeError, match=f"{call}: this controller was released.*attach again"):
        getattr(made, call)(["blocks.1"])
    assert all(p.requires_grad for p in model.parameters())
    again = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "order": "any"})
    again.freeze(["blocks.1"])
    assert again.frozen == ("blocks.1",)
    again.release()
