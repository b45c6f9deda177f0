"""Schedules: settings of phases, the layers and steps that they name, and the command that writes one (engines: test_schedules_run.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config
from typer.testing import CliRunner

import smartfrz_ds
from smartfrz_ds.cli.main import app
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.policies import LayerInfo, ManualPolicy, SchedulePolicy, View
from smartfrz_ds.runtime.rules.before_start import problems_of_length
from smartfrz_ds.runtime.rules.intervals import first_stage, needs_length, resolve
from smartfrz_ds.runtime.rules.replay import phases_of_log

LAYERS = tuple(
    LayerInfo(name=name, kind=kind, numel=numel)  # type: ignore[arg-type]
    for name, kind, numel in [
        ("embed", "embedding", 5),
        ("b.0", "block", 7),
        ("b.1", "block", 7),
        ("b.10", "block", 7),
        ("head", "head", 3),
    ]
)


def section(*phases: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"policy": "schedule", "schedule": {"phases": list(phases), **more}}


def problem(settings: dict[str, Any], total_steps: int | None = 100) -> str:
    """What a run with these settings is told at its start, for the layers above."""
    with pytest.raises(ValueError) as caught:
        start(settings, total_steps)
    return str(caught.value)


def start(settings: dict[str, Any], total_steps: int | None = 100, layers: tuple[LayerInfo, ...] = LAYERS) -> SchedulePolicy:
    config = FreezeConfig.load(settings)
    policy = SchedulePolicy(**resolve(config, total_steps).policy, order=config.order)
    policy.check_start(total_steps, layers)
    return policy


def view(
    step: int, frozen: tuple[str, ...] = (), *, users: tuple[str, ...] = (), layers: tuple[LayerInfo, ...] = LAYERS, **metrics: float
) -> View:
    return View(
        step=step,
        total_steps=100,
        lr_spent=0.0,
        lr_remaining=None,
        layers=layers,
        frozen=frozen,
        candidates=tuple(x.name for x in layers if x.kind != "head" and x.numel and x.name not in frozen),
        windows={},
        window_size=2,
        user_frozen=users,
        metrics=metrics,
    )


# --- settings


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (
            {"freeze": ["*"]},
            "smartfrz.schedule.phases[0].begin: got null; allowed: an integer or a share here, or one of epoch and plateau",
        ),
        ({"begin": 3, "epoch": 1, "freeze": ["*"]}, "smartfrz.schedule.phases[0].epoch: got 1 beside begin (3); allowed: only one of them"),
        ({"begin": 3}, "smartfrz.schedule.phases[0].freeze: got an empty list, and so has thaw; allowed: at least one name pattern"),
        ({"begin": "3", "freeze": ["*"]}, 'smartfrz.schedule.phases[0].begin: got "3"; allowed: an integer >= 0, or a share of the run'),
        ({"begin": -1, "freeze": ["*"]}, "smartfrz.schedule.phases[0].begin: got -1; allowed: an integer >= 0"),
        ({"begin": 3, "frieze": ["*"]}, "smartfrz.schedule.phases[0].frieze: unknown key; did you mean 'freeze'?"),
        ({"begin": 3, "freeze": "*"}, 'smartfrz.schedule.phases[0].freeze: got "*"; allowed: a list of name patterns'),
        ({"begin": 3, "freeze": ["re:b.("]}, 'smartfrz.schedule.phases[0].freeze: got ["re:b.("]; allowed: a list of name patterns'),
        ({"plateau": "loss", "patience": 0, "freeze": ["*"]}, "smartfrz.schedule.phases[0].patience: got 0; allowed: an integer >= 1"),
    ],
)
def test_a_wrong_phase_is_named_by_its_place(phase: dict[str, Any], said: str) -> None:
    assert said in problem(section(phase))


@pytest.mark.parametrize(
    ("settings", "total", "said"),
    [
        (
            section(),
            100,
            "smartfrz.schedule.phases: got an empty list; allowed: at least one phase, or a log at smartfrz.schedule.from_log",
        ),
        (section({"begin": 1, "freeze": ["*"]}, from_log="x"), 100, "smartfrz.schedule.from_log: got a path beside phases"),
        (
            section({"begin": "10%", "freeze": ["*"]}),
            None,
            "phases[0].begin: got '10%', and the length of the run is unknown; allowed: an integer",
        ),
        (section({"epoch": 1, "freeze": ["*"]}), 100, "phases[0].epoch: got 1, and smartfrz.schedule.epochs is null"),
        (section({"epoch": 1, "freeze": ["*"]}, epochs=2), None, "phases[0].epoch: got 1, and the length of the run is unknown"),
        (section({"begin": 100, "freeze": ["*"]}), 100, "phases[0].begin: got 100, and the run ends at 100; allowed: less than that"),
        (section({"epoch": 2, "freeze": ["*"]}, epochs=2), 100, "phases[0].begins at step 100, and the run ends at 100"),
        (
            section({"begin": 50, "freeze": ["embed"]}, {"begin": "20%", "thaw": ["embed"]}),
            100,
            "phases[1].begins at step 20; allowed: at least 50, where the phase in front of it begins",
        ),
    ],
)
def test_wrong_beginnings_are_refused_at_the_start_and_by_check_config(
    settings: dict[str, Any], total: int | None, said: str, tmp_path: Path
) -> None:
    assert said in problem(settings, total)
    if total is not None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps({"train_batch_size": 2, "smartfrz": settings}))
        done = CliRunner().invoke(app, ["check-config", str(file), "--total-steps", str(total)])
        assert done.exit_code == 2 and said in done.output


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"begin": 1, "freeze": ["c.*"]}], "phases[0].freeze: 'c.*' matches no layer; the nearest names are"),
        ([{"begin": 1, "freeze": ["h*d"]}], "phases[0].freeze: 'h*d' matches only the head, which no policy freezes"),
        ([{"begin": 1, "thaw": ["embed"]}], "phases[0]: changes nothing: freeze names [], thaw ['embed'], and frozen by then are []"),
        ([{"begin": 1, "freeze": ["embed"]}, {"begin": 2, "freeze": ["embed"]}], "phases[1]: changes nothing"),
        ([{"begin": 1, "freeze": ["*"], "thaw": ["b.0"]}], "phases[0]: ['b.0'] are in freeze and in thaw"),
        ([{"begin": 1, "freeze": ["b.0"]}], "phases[0]: 'b.0' would be frozen while 'embed' in front of it trains (smartfrz.order is"),
        ([{"begin": 1, "freeze": ["*"]}, {"begin": 2, "thaw": ["embed"]}], "phases[1]: 'b.0' would be frozen while 'embed' in front of it"),
    ],
)
def test_phases_that_do_not_fit_the_layers_are_refused(phases: list[dict[str, Any]], said: str) -> None:
    assert f"smartfrz.schedule.{said}" in problem(section(*phases))


def test_a_phase_leaves_something_to_train() -> None:
    """Under LoRA the head has no weights that train."""
    layers = (*LAYERS[:-1], LayerInfo(name="head", kind="head", numel=0))
    with pytest.raises(ValueError, match=r"phases\[0\]: nothing would be left to train; allowed: at least one layer that trains"):
        start(section({"begin": 1, "freeze": ["*"]}), layers=layers)
    start(section({"begin": 1, "freeze": ["embed", "b.?"]}), layers=layers)


def test_beginnings_are_steps_shares_and_epochs() -> None:
    policy = start(
        section(
            {"begin": 0, "freeze": ["*"]},
            {"begin": "10%", "thaw": ["b.10"]},
            {"epoch": 1, "thaw": ["re:b\\.1"]},
            {"epoch": 2.5, "thaw": ["b.*"]},
            {"plateau": "loss", "begin": "90%", "thaw": ["embed"]},
            epochs=4,
        )
    )
    assert [phase.begin for phase in policy.phases] == [0, 10, 25, 62, 90]
    assert policy.change_steps(100) == {0, 10, 25, 62, 90}
    assert policy._named[2:4] == [((), ("b.1",)), ((), ("b.0", "b.1", "b.10"))]
    assert first_stage(FreezeConfig.load(section({"begin": 7, "freeze": ["embed"]})), 100) == 7


@pytest.mark.parametrize(
    ("phase", "needed"), [({"begin": 3}, False), ({"begin": "0%"}, False), ({"begin": "5%"}, True), ({"epoch": 1}, True)]
)
def test_shares_and_epochs_need_the_length_of_the_run(phase: dict[str, Any], needed: bool) -> None:
    config = FreezeConfig.load(section({**phase, "freeze": ["embed"]}, epochs=2))
    assert needs_length(config) == needed
    assert bool(problems_of_length(config, None)) == needed and not problems_of_length(config, 100)


def test_any_order_is_allowed_where_the_settings_say_so() -> None:
    start({**section({"begin": 1, "freeze": ["b.1"]}), "order": "any"})


# --- decisions


def test_phases_that_are_late_begin_together_in_their_order() -> None:
    policy = start(section({"begin": 0, "freeze": ["*"]}, {"begin": 5, "thaw": ["b.10"]}, {"begin": 9, "thaw": ["b.1"]}))
    decision = policy.decide(view(7))
    assert decision.freeze == ("embed", "b.0", "b.1") and decision.thaw == ()
    assert decision.reasons["embed"] == "phase 2 of 3" and decision.note == "phase 2 of 3 since step 7"
    assert policy.decide(view(8, decision.freeze)) == smartfrz_ds.Decision()
    assert policy.decide(view(9, decision.freeze)).thaw == ("b.1",)


def test_a_layer_that_may_not_freeze_now_stays_out() -> None:
    policy = start(section({"begin": 1, "freeze": ["*"]}))
    seen = view(1)
    kept = View(**{**vars(seen), "candidates": ("embed", "b.0")})
    assert policy.decide(kept).freeze == ("embed", "b.0")


def test_layers_of_the_user_are_named_to_be_thawed_only_where_they_still_are_theirs() -> None:
    layers = (LayerInfo(name="embed", kind="embedding", numel=0), *LAYERS[1:])
    policy = start(section({"begin": 1, "thaw": ["embed"]}), layers=layers)
    assert policy.decide(view(1, users=("embed",), layers=layers)).thaw == ("embed",)
    policy = start(section({"begin": 1, "thaw": ["embed"]}), layers=layers)
    assert policy.decide(view(1, layers=layers)).thaw == (), "the script has thawed it itself"


def test_a_plateau_is_that_many_stages_without_a_new_best() -> None:
    policy = start(section({"plateau": "loss", "patience": 2, "tolerance": 0.1, "freeze": ["embed"]}))
    seen = [2.0, 1.9, 1.7, None, 1.6, 1.7]  # 1.9 is no new best at a tolerance of 10 %; a stage without a value does not count
    decisions = [policy.decide(view(k + 1, **({} if x is None else {"loss": x}))).freeze for k, x in enumerate(seen)]
    assert decisions == [(), (), (), (), (), ("embed",)]


def test_the_state_goes_on_and_an_edited_schedule_starts_over() -> None:
    phases = [{"begin": 1, "freeze": ["embed"]}, {"plateau": "loss", "patience": 2, "freeze": ["b.0"]}]
    policy = start(section(*phases))
    policy.decide(view(1))
    policy.decide(view(2, ("embed",), loss=1.0))
    policy.decide(view(3, ("embed",), loss=1.0))
    state = json.loads(json.dumps(policy.state_dict()))
    other = start(section(*phases))
    other.load_state_dict(state)
    assert other.state_dict() == state and other.decide(view(4, ("embed",), loss=1.0)).freeze == ("b.0",)
    edited = start(section({"begin": 1, "freeze": ["embed", "b.0"]}, {**phases[1], "freeze": ["b.1"]}))
    edited.load_state_dict(state)
    assert edited.decide(view(4, ("embed",))).freeze == ("b.0",), "the first phase begins again, as it is now"


def test_manual_is_the_schedule_without_a_phase() -> None:
    policy = ManualPolicy()
    assert isinstance(policy, SchedulePolicy) and policy.decide(view(3)) == smartfrz_ds.Decision()


# --- in a run of one process


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)), nn.Linear(4, 2))


def run(settings: dict[str, Any], steps: int) -> smartfrz_ds.TorchController:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = smartfrz_ds.attach_torch(model, optimizer, settings)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.1 * (step + 1))).square().mean().backward()
        optimizer.step()
    controller.detach()
    return controller


def test_kept_layers_stay_active_whatever_a_phase_names() -> None:
    controller = run({**section({"begin": 0, "freeze": ["*"]}), "keep_active": ["2"], "order": "any"}, 3)
    (event,) = controller.report().events
    assert event.step == 0 and set(event.layers) == {"embeddings", "1", "3"}


def test_a_log_is_replayed_by_the_settings_and_by_the_command(tmp_path: Path) -> None:
    log = tmp_path / "first.jsonl"
    settings = {**section({"begin": 0, "freeze": ["*"]}, {"begin": 2, "thaw": ["3"]}, {"begin": 4, "thaw": ["2"]}), "total_steps": 8}
    first = run({**settings, "log_path": str(log)}, 6)
    again = run({"policy": "schedule", "schedule": {"from_log": str(log)}}, 6)
    told = [[(e.kind, e.step, e.layers) for e in controller.report().events if e.kind != "warning"] for controller in (first, again)]
    assert told[0] == told[1] and len(told[0]) == 3
    done = CliRunner().invoke(app, ["schedule", "--from-log", str(log)])
    assert done.exit_code == 0, done.output
    (tmp_path / "written.json").write_text(done.output)
    config = FreezeConfig.load(tmp_path / "written.json")
    assert config.policy == "schedule" and config.schedule.phases == phases_of_log(log, "")
    rows = [line.split() for line in done.output.splitlines() if "head" in line and "%" in line]
    assert [row[1:6] for row in rows] == [["1", "0", "freeze", "4", "1:"], ["2", "2", "thaw", "1", "2:"], ["3", "4", "thaw", "1", "3:"]]


def test_a_log_without_a_freeze_is_refused(tmp_path: Path) -> None:
    run({"policy": "manual", "log_path": str(tmp_path / "log.jsonl"), "total_steps": 3}, 3)
    for action in (
        lambda: phases_of_log(tmp_path / "log.jsonl", "--from-log"),
        lambda: resolve(FreezeConfig.load({"policy": "schedule", "schedule": {"from_log": str(tmp_path / "log.jsonl")}}), 10),
    ):
        with pytest.raises(ValueError, match="in which nothing froze; allowed: the log of a run with at least one freeze"):
            action()


def test_phases_before_the_first_step_come_after_it_where_the_length_comes_too_late() -> None:
    """attach(defer_policy=True) without set_schedule: the first step tells it, in the middle of which nothing can freeze."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = smartfrz_ds.attach_torch(model, optimizer, section({"begin": 0, "freeze": ["*"]}), defer_policy=True)
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    assert [(e.step, len(e.layers)) for e in controller.report().events if e.kind == "freeze"] == [(1, 4)]


# --- the command


def model_dir(folder: Path, kind: str) -> Path:
    if kind == "gpt2":
        config: Any = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=8, n_head=2, architectures=["GPT2LMHeadModel"])
    else:
        config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32)
        config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("unfreeze", [False, True])
def test_the_written_schedule_is_a_settings_file_that_fits_its_model(tmp_path: Path, kind: str, unfreeze: bool) -> None:
    folder = model_dir(tmp_path / kind, kind)
    options = ["--unfreeze"] if unfreeze else []
    done = CliRunner().invoke(app, ["schedule", "--model", str(folder), "--total-steps", "200", *options])
    assert done.exit_code == 0, done.output
    file = tmp_path / "schedule.json"
    file.write_text(done.output)
    config = FreezeConfig.load(file)
    assert config.policy == "schedule" and len(config.schedule.phases) == (5 if unfreeze else 3)
    checked = CliRunner().invoke(app, ["check-config", str(file), "--total-steps", "200"])
    assert checked.exit_code == 0 and "WARNING" not in checked.output, checked.output
    table = CliRunner().invoke(app, ["schedule", "--model", str(folder), "--config", str(file), "--total-steps", "200"])
    assert table.exit_code == 0, table.output
    # the last line is what trains at the end: everything, or a quarter of the body and the head
    last = table.output.splitlines()[-1].split()
    assert (last[-1] == "100.0%") == unfreeze


def test_counts_are_those_of_the_real_model_and_tied_weights_go_on(tmp_path: Path) -> None:
    """GPT-2's head is the embedding: with `tied: train` it trains while the embedding is frozen."""
    import transformers

    folder = model_dir(tmp_path / "gpt2", "gpt2")
    real = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(folder))
    whole = sum(p.numel() for p in real.parameters())
    lines = CliRunner().invoke(app, ["schedule", "--model", str(folder), "--unfreeze"]).output.splitlines()
    first = next(line for line in lines if line.startswith("#   1 "))
    head = real.transformer.wte.weight.numel() + sum(p.numel() for p in real.transformer.ln_f.parameters())
    assert f"{head:,}" in first and any(f"{whole:,}" in line and "100.0%" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model, --from-log: got neither; allowed: a model's folder, the log of a run, or both"),
        (["--model", "nowhere"], "--model: got 'nowhere', which has no config.json; allowed: the folder of a Hugging Face model"),
        (["--from-log", "nowhere.jsonl"], "nowhere.jsonl: no such folder or file"),
        (["--from-log", "x", "--unfreeze"], "--from-log: got it with --unfreeze or --config"),
    ],
)
def test_wrong_options_say_what_is_allowed(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["schedule", *arguments])
    assert done.exit_code == 2 and said in done.output


def test_a_schedule_for_another_model_is_refused_with_the_text_of_the_start(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"smartfrz": section({"begin": 1, "freeze": ["decoder.*"]})}))
    done = CliRunner().invoke(app, ["schedule", "--model", str(model_dir(tmp_path / "m", "bert")), "--config", str(file)])
    assert done.exit_code == 2 and "smartfrz.schedule.phases[0].freeze: 'decoder.*' matches no layer" in done.output
