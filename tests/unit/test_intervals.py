"""Settings that count steps: what a share of the run becomes, when a run can freeze, and what a resume into another length keeps."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import oracle
from torch import nn

import smartfrz_ds
import smartfrz_ds.policies
from smartfrz_ds.bench.policies.files import POLICIES_FILE, read_policies
from smartfrz_ds.bench.policies.runs import resolve as of_bench
from smartfrz_ds.cli.check_config import settings_text
from smartfrz_ds.config.settings import FreezeConfig, digest
from smartfrz_ds.policies import LayerInfo
from smartfrz_ds.predictor.constants import MIN_SNAPSHOTS
from smartfrz_ds.runtime.rules.intervals import first_stage, needs_length, resolve, why_never
from smartfrz_ds.telemetry.events import read_events


def config(**settings: Any) -> FreezeConfig:
    return FreezeConfig.load({"smartfrz": settings})


def three(settings: FreezeConfig, total: int | None) -> tuple[int, int, int]:
    now = resolve(settings, total)
    return now.warmup_steps, now.snapshot_interval, now.freeze_interval


# ---- shares become steps


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (1, (1, 1, 1)),
        (60, (6, 1, 2)),
        (200, (20, 2, 8)),
        (390, (39, 3, 16)),
        (1000, (100, 8, 40)),
        (1250, (125, 10, 50)),
        (100_000, (10_000, 800, 4000)),
        (None, (100, 10, 50)),
    ],
)
def test_the_defaults_fit_every_length(total: int | None, expected: tuple[int, int, int]) -> None:
    assert three(FreezeConfig(), total) == expected


def test_the_defaults_are_those_of_the_benchmark() -> None:
    common = read_policies(POLICIES_FILE).common
    for steps in (60, 390, 1000, 1234):
        section = of_bench(common, {}, "attention", steps, 0, "")
        own = config(**{k: v for k, v in section.items() if k not in ("warmup_steps", "snapshot_interval", "freeze_interval")})
        assert resolve(own, steps) == resolve(config(**section), steps)


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({"snapshot_interval": 20}, 200, (20, 20, 20)),  # a default follows what the user wrote
        ({"snapshot_interval": 51}, None, (100, 51, 51)),
        ({"freeze_interval": 3}, 1000, (100, 3, 3)),
        ({"freeze_interval": 9}, None, (100, 9, 9)),
        ({"freeze_interval": "0.4%"}, 1000, (100, 4, 4)),
        ({"snapshot_interval": "5%"}, 1000, (100, 50, 50)),
        ({"snapshot_interval": 20, "freeze_interval": "2%"}, 200, (20, 20, 20)),  # a share follows a number
        ({"snapshot_interval": "2%", "freeze_interval": 2}, 200, (20, 2, 2)),
        ({"warmup_steps": 0}, 1000, (0, 8, 40)),
        ({"warmup_steps": "0%", "snapshot_interval": "0.01%", "freeze_interval": "0.01%"}, 60, (0, 1, 1)),
        ({"warmup_steps": "25%", "snapshot_interval": 7, "freeze_interval": 70}, 1000, (250, 7, 70)),
    ],
)
def test_intervals_fit_each_other(settings: dict[str, Any], total: int | None, expected: tuple[int, int, int]) -> None:
    assert three(config(**settings), total) == expected


def test_the_other_settings_that_count_steps() -> None:
    settings = config(keep_state="5%", status_interval="1%", guard={"window": "2%"}, policy="random", random={"start_step": "25%"})
    now = resolve(settings, 1000)
    assert (now.keep_state, now.status_interval, now.guard_window) == (50, 10, 20)
    assert (now.policy["start_step"], now.policy["end_step"]) == (250, None)
    assert resolve(FreezeConfig(), 1000).status_interval == 40  # as freeze_interval
    assert resolve(config(guard={}), 10).guard_window == 50 and resolve(FreezeConfig(), 10).guard_window == 0
    assert resolve(config(policy="pipetransformer", pipetransformer={"interval": "20%"}), 60).policy["interval"] == 12


def test_start_and_end_stay_apart_in_a_short_run() -> None:
    for policy, total in itertools.product(("linear", "random"), range(1, 12)):
        for own in ({}, {"start_step": "40%", "end_step": "45%"}):
            settings = config(policy=policy, **{policy: own})
            kind: Any = {"linear": smartfrz_ds.policies.LinearPolicy, "random": smartfrz_ds.policies.RandomPolicy}[policy]
            start, end = kind(**resolve(settings, total).policy)._steps(total)
            assert start < end, (policy, total, own)


def test_a_share_of_an_unknown_length_is_refused_by_name() -> None:
    settings = config(policy="late", warmup_steps="20%", keep_state="5%", late={"start_step": "50%"}, guard={"window": "3%"})
    with pytest.raises(ValueError, match="length of the run is unknown") as caught:
        resolve(settings, None)
    lines = str(caught.value).splitlines()
    assert [line.split(": got ")[0] for line in lines] == [
        "smartfrz.warmup_steps", "smartfrz.keep_state", "smartfrz.guard.window", "smartfrz.late.start_step"
    ]  # fmt: skip
    assert lines[0].endswith("got '20%', and the length of the run is unknown; allowed: an integer here, or one at smartfrz.total_steps")
    resolve(settings, 100)
    resolve(settings, None, provisional=True)
    resolve(config(policy="manual", warmup_steps="20%"), None)  # which has no use for it
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"smartfrz\.freeze_interval: got '3%', and the length of the run is unknown"):
        smartfrz_ds.attach_torch(model, torch.optim.SGD(model.parameters(), lr=0.1), {"freeze_interval": "3%"})


def test_no_share_of_an_unknown_length_is_none() -> None:
    now = resolve(FreezeConfig(warmup_steps="0%", keep_state="0%"), None)
    assert (now.warmup_steps, now.keep_state) == (0, 0)


def test_ranks_compare_what_was_written() -> None:
    assert digest(config(warmup_steps="10%")) == digest(FreezeConfig())
    assert digest(config(warmup_steps="20%")) != digest(FreezeConfig()) != digest(config(warmup_steps=100))


# ---- when a run can freeze


def test_the_first_stage_is_the_first() -> None:
    choices: dict[str, tuple[Any, ...]] = {
        "warmup_steps": (0, 1, 40, 100, "0%", "10%", "99%", "100%"),
        "freeze_interval": (31, 50, "4%", "60%"),
        "snapshot_interval": (1, 30, "0.8%", "4%"),
    }
    for values in itertools.product(*choices.values()):
        made = config(**dict(zip(choices, values, strict=True)))
        for total in (1, 2, 31, 50, 51, 60, 100, 101, 124, 300):
            now = resolve(made, total)
            stages = [step for step in range(1, total + 1) if now.is_stage(step, total)]
            assert first_stage(made, total) == (stages[0] if stages else None), (made, total)
            assert stages or "nothing will freeze. Set " in why_never(made, total)


def test_no_stage_where_nobody_decides() -> None:
    for settings in (config(enabled=False), config(policy="manual")):
        assert first_stage(settings, 1000) is None and why_never(settings, 5) == ""
    assert first_stage(FreezeConfig(), None) == 100 and why_never(FreezeConfig(), None) == ""


def test_default_runs_can_freeze_from_12_steps_on() -> None:
    able = [total for total in range(1, 3000) if not why_never(FreezeConfig(), total)]
    assert able == list(range(MIN_SNAPSHOTS + 2, 3000))


NOTHING = "nothing will freeze. Set smartfrz."


@pytest.mark.parametrize(
    ("settings", "total", "words"),
    [
        ({"warmup_steps": 100}, 60, f"first freezing stage is step 100, and the run ends at 60: {NOTHING}warmup_steps (now 100)"),
        ({"warmup_steps": "100%"}, 60, "smartfrz.warmup_steps (now 60) to less, or to '10%' of the run, its default"),
        ({"freeze_interval": 50, "policy": "late"}, 50, f"step 50, and the run ends at 50: {NOTHING}freeze_interval (now 50) to less"),
        ({"snapshot_interval": 10}, 90, "step 110 at the earliest (10 snapshots, one every 10 steps, and 2 freezing stages, one every 10)"),
        ({"attention": {"patience": 30}}, 100, "and 30 freezing stages, one every 4), and the run ends at 100: nothing will freeze. Set "),
        ({"window": 9}, None, "smartfrz.window keeps 9: nothing will freeze. Set smartfrz.window to 10 or more"),
        ({"policy": "late", "late": {"start_step": 400}}, 390, f"begin at 400, and the run ends at 390: {NOTHING}late.start_step"),
        ({"policy": "late", "late": {"start_step": "100%"}}, 390, "smartfrz.late.start_step to an earlier step"),
        ({"policy": "linear", "linear": {"start_step": 385, "end_step": 500}}, 390, "as its own settings begin at 385"),
        ({"policy": "pipetransformer", "pipetransformer": {"interval": 390}}, 390, "Set smartfrz.pipetransformer.interval"),
        ({"policy": "autofreeze", "freeze_interval": 200}, 390, "second stage, step 400"),
    ],
)  # fmt: skip
def test_a_run_that_can_not_freeze_says_what_to_set(settings: dict[str, Any], total: int | None, words: str) -> None:
    assert words in why_never(config(**settings), total)


@pytest.mark.parametrize("name", sorted(smartfrz_ds.policies.POLICIES.keys() - {"schedule"}))  # test_phases.py
@pytest.mark.parametrize("given", [{}, {"start_step": 5, "end_step": 9, "interval": 3, "mode": "budget"}])
def test_the_policies_that_need_a_length_are_those_that_refuse_to_do_without(name: str, given: dict[str, Any]) -> None:
    known = FreezeConfig.model_fields[name].default.__class__.model_fields
    settings = config(policy=name, **{name: {key: value for key, value in given.items() if key in known}})
    shared = {key: getattr(settings, key) for key in smartfrz_ds.policies.SHARED_SETTINGS.get(name, ())}
    provided = ["weights", "gradients", "activations", "lr_scale"]
    try:
        policy = smartfrz_ds.policies.make_policy(name, {**resolve(settings, None, provisional=True).policy, **shared})
        smartfrz_ds.policies.check_needs(policy, provided)  # type: ignore[arg-type]
        if isinstance(policy, smartfrz_ds.policies.ChecksStart):
            policy.check_start(None, (LayerInfo(name="a", kind="block", numel=4), LayerInfo(name="b", kind="head", numel=4)))
        refused = False
    except ValueError as error:
        assert "the length of the run" in str(error)
        refused = True
    assert needs_length(settings) == refused


def test_check_config_shows_steps_and_the_first_stage(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 390}}}))
    lines = settings_text(file).splitlines()
    assert 'smartfrz.freeze_interval "4%" = 16 steps (default)' in [" ".join(line.split()) for line in lines]  # columns are aligned
    assert lines[-2:] == ["first freezing stage: step 48 of 390", f"{file}: ok"]
    assert "first freezing stage: step 6 of 60" in settings_text(file, 60)
    file.write_text('{"smartfrz": {"warmup_steps": 500, "total_steps": 390}}')
    assert "WARNING: the first freezing stage is step 512, and the run ends at 390: nothing will freeze. Set " in settings_text(file)
    file.write_text('{"smartfrz": {"warmup_steps": "20%"}}')
    assert "WARNING: smartfrz.warmup_steps: got '20%', and the length of the run is unknown" in settings_text(file)
    file.write_text("{}")
    assert "first freezing stage: step 100\nlength of the run: not in the file." in settings_text(file)


# ---- in runs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Any, labels: Any = None) -> Any:
        for block in self.blocks:
            x = block(x)
        y = self.head(x)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


@pytest.mark.parametrize("steps", [8, 60, 200, 390, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_default_run_of_the_trainer_has_freezing_stages(steps: int, tmp_path: Path) -> None:
    """Of 60, 200 or 390 steps, with all defaults, none had one: warm-up 100, a stage every 50, ten snapshots 10 steps apart."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    data = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(64)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    callback = smartfrz_ds.FreezeCallback(log_path=str(tmp_path / "log.jsonl"))
    trainer = Trainer(Net(), arguments, train_dataset=data, callbacks=[callback])
    if steps == 8:
        with pytest.warns(RuntimeWarning, match="'attention' can freeze at step 11 at the earliest"):
            trainer.train()
        return
    trainer.train()  # warnings are errors
    stages = [event.step for event in read_events(tmp_path / "log.jsonl") if event.kind in ("decision", "freeze")]
    now = resolve(FreezeConfig(), steps)
    judged = now.first_from(MIN_SNAPSHOTS * now.snapshot_interval)
    # From then on every stage shows in the log, but for the one that each freeze makes the policy wait.
    assert stages[0] == judged and len(stages) >= ((steps - 1 - judged) // now.freeze_interval + 1) // 2 >= 10


def run(total: int, log: Path, **settings: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    section = {"total_steps": total, "log_path": str(log), "policy": "autofreeze", "autofreeze": {"quantile": 0.75}, **settings}
    return model, optimizer, smartfrz_ds.attach_torch(model, optimizer, section)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator))["loss"].backward()
        optimizer.step()


def stages_of(log: Path, after: int = 0) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(e.step, e.kind, e.layers) for e in read_events(log) if e.kind in ("decision", "freeze") and e.step > after]


def test_a_resume_keeps_the_schedule_of_the_same_length_and_starts_anew_in_another(tmp_path: Path) -> None:
    """250 steps: a snapshot every 2, a stage every 10, from 25 on; saved within an interval, whose gradients are summed half."""
    model, optimizer, controller = run(250, tmp_path / "straight.jsonl")
    train(model, optimizer, range(64))
    frozen = controller.frozen
    assert frozen
    controller.save(tmp_path)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "own.pt")
    train(model, optimizer, range(64, 250))
    straight = stages_of(tmp_path / "straight.jsonl")
    assert straight[0][0] >= 30 and all(step % 10 == 0 for step, *_ in straight)

    def resumed(total: int, log: str, **settings: Any) -> tuple[nn.Module, Any, Any]:
        model, optimizer, controller = run(total, tmp_path / log, **settings)
        controller.restore(tmp_path)
        for x, state in zip((model, optimizer), torch.load(tmp_path / "own.pt"), strict=True):
            x.load_state_dict(state)
        assert controller.frozen == frozen and controller.step == 64
        return model, optimizer, controller

    same, optimizer, controller = resumed(250, "same.jsonl")
    assert {len(item["steps"]) for item in controller.state_dict()["history"].values()} <= set(range(1, 31))
    train(same, optimizer, range(64, 250))
    after = [stage for stage in straight if stage[0] > 64]
    assert after and stages_of(tmp_path / "same.jsonl") == after
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))

    with pytest.warns(
        RuntimeWarning, match="saved with snapshots every 2 steps and freezing stages every 10, this run has them every 8 and 40"
    ):
        longer, optimizer, controller = resumed(1000, "longer.jsonl")
    assert controller.state_dict()["history"] == {} and controller.state_dict()["policy"]["state"] == {"before": {}}
    warned = [e.message for e in read_events(tmp_path / "longer.jsonl") if e.kind == "warning"]
    assert len(warned) == 1 and "the policy starts anew" in warned[0]
    train(longer, optimizer, range(64, 200))
    judged = stages_of(tmp_path / "longer.jsonl")
    # The interval that was half over at the resume gives no number, so that the third full one is the first with one before it.
    assert all(step % 40 == 0 for step, *_ in judged) and all(step >= 160 for step, kind, _ in judged if kind == "freeze")

    # With the checkpoint's numbers a longer run goes on as the shorter one did.
    on, optimizer, controller = resumed(1000, "on.jsonl", snapshot_interval=2, freeze_interval=10, warmup_steps=25)
    train(on, optimizer, range(64, 250))
    assert [s for s in stages_of(tmp_path / "on.jsonl") if s[0] < 250] == after


def test_the_length_may_come_later(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    section = {"warmup_steps": "20%", "status_interval": "5%", "guard": {"window": "3%"}, "keep_state": "2%"}
    controller = smartfrz_ds.attach_torch(model, optimizer, section, defer_policy=True)
    controller.set_schedule(total_steps=200)
    now = controller.intervals
    assert (now.warmup_steps, now.freeze_interval, now.status_interval, now.guard_window, now.keep_state) == (40, 8, 10, 6, 4)
    assert controller._guard.guard.window == 6 and controller._observers[0].status.interval == 10


def test_a_controller_says_when_the_next_stage_comes() -> None:
    torch.manual_seed(0)
    model = oracle.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = smartfrz_ds.attach_torch(
        model, optimizer, policy="linear", total_steps=12, warmup_steps=3, freeze_interval=4, snapshot_interval=1
    )
    seen = [controller.next_stage]
    for number in range(12):
        model(oracle.data(number, 0, 0)[0]).square().mean().backward()
        optimizer.step()
        seen.append(controller.next_stage)
    assert seen == [4] * 4 + [8] * 4 + [None] * 5  # the last step is no stage
    controller.detach()
