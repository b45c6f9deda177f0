"""Policies that are not built in: the settings that name one, and the checks of what they name. On engines: test_own_policies.py."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import own_policies
from torch import nn
from typer.testing import CliRunner

import smartfrz_ds
from smartfrz_ds.cli.main import app
from smartfrz_ds.config.own import installed_policies, with_object
from smartfrz_ds.config.settings import FreezeConfig, digest, with_settings
from smartfrz_ds.policies import POLICIES, make_policy, policy_class

MODULE = "reference.own_policies"


def problem(name: str, settings: dict[str, Any] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        make_policy(name, settings or {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NoMethods", "lacks state_dict(self), load_state_dict(self, state); needed: the methods of smartfrz_ds.Policy"),
        ("WrongSignature", "has decide(self) -> 'Any': too many positional arguments; needed: decide(self, view)"),
        ("Awaits", "has decide as a coroutine or generator; needed: a plain method decide(self, view)"),
        ("Nameless", "has the name ''; needed: an attribute name, a text that is not empty"),
        ("TakesAName", "has the name 'linear'; needed: an attribute name, a text that is not empty, not that of a built-in policy"),
        ("WrongNeeds", "has needs = frozenset({'losses'}); needed: a frozenset of 'weights', 'gradients',"),
        ("HalfRates", "has only one of needs with 'lr_scale' and the method lr_scales"),
        ("SavesTensors", "the state of 'good' cannot be saved (TypeError: Object of type object is not JSON serializable)"),
        ("CannotLoad", "cannot load the state that it saves (KeyError: 'stage')"),
        ("Missing", f"cannot be imported (AttributeError: module '{MODULE}' has no attribute 'Missing')"),
        ("not_a_class", f"got '{MODULE}:not_a_class', which is a Good; allowed: a class"),
    ],
)
def test_what_cannot_be_a_policy_is_refused_by_name(name: str, said: str) -> None:
    assert said in problem(f"{MODULE}:{name}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "smartfrz.policy_settings: threshold must be set for Strict, which has no default"),
        (
            {"threshold": 0.5, "mod": "mean"},
            "smartfrz.policy_settings.mod: unknown key; did you mean 'mode'? allowed: threshold, mode, names",
        ),
        ({"threshold": "0.5"}, 'smartfrz.policy_settings.threshold: got "0.5"; allowed: Input should be a valid number'),
        ({"threshold": 0.5, "names": ["a", 3]}, "smartfrz.policy_settings.names.1: got 3; allowed: Input should be a valid string"),
        ({"threshold": 2.0}, "smartfrz.policy_settings: Strict refuses them: ValueError: threshold: got 2.0; allowed: at most 1"),
    ],
)
def test_its_settings_are_checked_against_its_class(settings: dict[str, Any], said: str) -> None:
    assert said in problem(f"{MODULE}:Strict", settings)


def test_its_settings_arrive_as_annotated() -> None:
    policy = make_policy(f"{MODULE}:Strict", {"threshold": 1, "names": ["a", "b"]})
    assert vars(policy) == {"threshold": 1.0, "mode": "mean", "names": ("a", "b")}


def test_a_module_that_raises_at_its_import_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "raises_at_import.py").write_text("raise OSError('no data here')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "cannot be imported (OSError: no data here)" in problem("raises_at_import:Policy")


def test_every_built_in_policy_passes_the_checks_of_an_own_one() -> None:
    """The protocol that users are held to is the one that this package follows."""
    from smartfrz_ds.policies.own import check_policy

    for name, kind in POLICIES.items():
        check_policy(kind(), name, {})


# --- the settings


def test_names_are_checked_without_an_import() -> None:
    assert FreezeConfig.load({"policy": "nowhere.at_all:Policy", "policy_settings": {"any": [1, {"thing": None}]}}).is_own_policy
    assert "nowhere" not in sys.modules
    for wrong in ("nowhere", "no where:Policy", "nowhere:", ":Policy", "a/b:C"):
        with pytest.raises(ValueError, match=r"smartfrz\.policy: got .*allowed: 'attention', .*'package\.module:Class'"):
            FreezeConfig.load({"policy": wrong})
    with pytest.raises(
        ValueError, match=r'policy_settings: got \{"t0": 1\}; allowed with the built-in policy \'freezeout\': an empty object'
    ):
        FreezeConfig.load({"policy": "freezeout", "policy_settings": {"t0": 1}})


def test_an_object_takes_the_place_of_a_name() -> None:
    policy = own_policies.EveryThird(every=5, layers=("a",))
    policy.stages = 2
    config = with_settings({"policy": "linear", "freeze_interval": 7}, {"policy": policy})
    assert config.policy == f"{MODULE}:EveryThird" and config.freeze_interval == 7
    assert digest(config) == digest(FreezeConfig.load({"policy": f"{MODULE}:EveryThird", "freeze_interval": 7}))
    policy.stages = 40
    assert make_policy(config.policy, {}, config.policy_object) is policy and policy.stages == 2, "a run that starts anew resets it"
    again = with_settings(config, {"freeze_interval": 8})
    assert again.policy_object is not None and again.policy_object.policy is policy
    assert with_settings(config, {"policy": "late"}).policy_object is None
    assert config.model_copy(update={"policy": "manual"}).policy_object is None
    assert policy_class(config.policy, config.policy_object) is own_policies.EveryThird


def test_objects_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got the class EveryThird; allowed: an object, EveryThird\(…\), or the text 'reference"):
        with_object({"policy": own_policies.EveryThird})
    with pytest.raises(ValueError, match=r"smartfrz\.policy: got 3; allowed: 'attention'"):
        FreezeConfig.load({"policy": 3})
    with pytest.raises(ValueError, match=r"policy_settings: got .*; allowed with an object: an empty object"):
        with_settings({"policy_settings": {"every": 3}}, {"policy": own_policies.EveryThird()})


def test_an_installed_package_offers_policies_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point as a wheel writes it; its module is imported only when the policy is made."""
    info = tmp_path / "thirds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[smartfrz.policies]\nthird = {MODULE}:EveryThird\nbroken = no_such_module:Policy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_policies() == {"third": f"{MODULE}:EveryThird", "broken": "no_such_module:Policy"}
    config = FreezeConfig.load({"policy": "third", "policy_settings": {"every": 4}})
    policy = make_policy(config.policy, config.chosen_settings)
    assert type(policy) is own_policies.EveryThird and policy.every == 4
    assert "got 'broken', which cannot be imported (ModuleNotFoundError" in problem(FreezeConfig.load({"policy": "broken"}).policy)


def test_check_config_and_doctor_import_it_too(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"

    def run(command: str, **section: Any) -> str:
        file.write_text(json.dumps({"train_batch_size": 2, "smartfrz": section}))
        done = CliRunner().invoke(app, [*command.split(), str(file)])
        return done.output

    good = {"policy": f"{MODULE}:EveryThird", "policy_settings": {"every": 4}}
    assert re.search(r"smartfrz\.policy_settings\.every +4$", run("check-config", **good), re.MULTILINE)
    wrong = {"policy": f"{MODULE}:EveryThird", "policy_settings": {"evry": 4}}
    for command in ("check-config", "doctor"):
        assert "smartfrz.policy_settings.evry: unknown key; did you mean 'every'?" in run(command, **wrong), command


# --- a run of one process


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.1 * (step + 1))).square().mean().backward()
        optimizer.step()


def test_a_class_of_the_script_itself_can_be_passed() -> None:
    """An object needs no importable class: here one of a function, as in a notebook."""

    class Front(own_policies.Good):
        name = "front"

        def decide(self, view: smartfrz_ds.View) -> smartfrz_ds.Decision:
            return smartfrz_ds.Decision(freeze=view.candidates[:1] if view.step == 2 else ())

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"warmup_steps": 0, "freeze_interval": 1, "total_steps": 6}
    controller = smartfrz_ds.attach_torch(model, optimizer, settings, policy=Front())
    train(model, optimizer, 4)
    assert controller.frozen == controller.layers[:1] and ".<locals>.Front" in controller.config.policy
    assert isinstance(Front(), smartfrz_ds.Policy)


def test_a_name_passed_as_policy_takes_precedence() -> None:
    model = net()
    controller = smartfrz_ds.attach_torch(model, torch.optim.SGD(model.parameters(), lr=0.1), {"policy": "linear"}, policy="manual")
    assert controller.config.policy == "manual"


def test_a_module_of_ones_own_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_policy")
    module.Mine = own_policies.EveryThird  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_policy", module)
    assert policy_class("my_policy:Mine") is own_policies.EveryThird
