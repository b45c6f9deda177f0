"""What a run says, who sees it, and that each line comes once. On two ranks: tests/integrations/test_lines.py."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS, environment
from torch import nn
from transformers import Trainer, TrainingArguments

import smartfrz_ds
from smartfrz_ds.telemetry.events import FreezeEvent
from smartfrz_ds.telemetry.outcome import Stages, outcome


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        y = self.head(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


@pytest.mark.parametrize("epochs", [False, True])
def test_lines_of_a_trainer(epochs: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """12 steps either way, told by a schedule that decays or else by the Trainer, which works them out from epochs. One process."""
    data = [{"x": torch.ones(4) * i, "labels": torch.ones(1)} for i in range(16)]
    length: dict[str, Any] = {"num_train_epochs": 3, "lr_scheduler_type": "constant"} if epochs else {"max_steps": 12}
    arguments = TrainingArguments(
        str(tmp_path), **length, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_steps=100,
    )  # fmt: skip
    log = tmp_path / "log.jsonl"
    callback = smartfrz_ds.FreezeCallback(
        policy="linear", linear={"start_step": 2, "end_step": 10}, warmup_steps=0, freeze_interval=4, cooldown=0, log_path=str(log)
    )
    gc.collect()  # a controller that an earlier test dropped says its last line when it is collected
    with caplog.at_level(logging.INFO, "smartfrz_ds"):
        Trainer(Regression(), arguments, train_dataset=data, callbacks=[callback]).train()
    told = [r.getMessage() for r in caplog.records if r.name == "smartfrz_ds" and r.levelno == logging.INFO]
    start, *freezes, end = told
    assert start == (
        "smartfrz: on (torch, 1 rank); policy linear; 5 layers (blocks.0 … head); 12 steps "
        f"({'the Trainer' if epochs else 'scheduler LambdaLR'}); first freezing stage at step 4; log {log}"
    )
    events = [event for event in callback.controller.report().events if event.kind == "freeze"]
    assert len(freezes) == len(events) == 2
    for line, event, now in zip(freezes, events, (1, 2), strict=True):
        assert line.startswith(f"smartfrz: step {event.step}: froze blocks.") and f"; {now} of 5 layers frozen; " in line
    last = "smartfrz: end at step 12 of 12: froze blocks.0 at step 4, blocks.1 at step 8; 2 of 5 layers frozen now: blocks.0, blocks.1; "
    assert end.startswith(last)


ALONE = """
import contextlib, io, json, logging, sys, warnings, torch, smartfrz_ds
from reference import oracle
warnings.simplefilter("ignore")
root, ours, seen = logging.getLogger(), logging.getLogger("smartfrz_ds"), {}

def run(settings, steps, act=lambda step, controller: None, ends=True):
    model = oracle.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = smartfrz_ds.attach_torch(model, optimizer, settings)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32").backward()
        optimizer.step()
        optimizer.zero_grad()
        act(step, controller)
    seen.setdefault("outcomes", []).append(controller.report().outcome)
    if ends:
        controller.release()

def by_hand(step, controller):
    if step == 2:
        controller.freeze(["embeddings", "blocks.0"])

def users(stream):
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    return handler

@contextlib.contextmanager
def case(name, before=lambda stream: None):
    assert not root.handlers and (not ours.handlers or name != "default")  # nothing at import
    stream, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors):
        before(stream)
        yield stream
    for logger in (root, ours):
        for handler in [h for h in logger.handlers if isinstance(h, logging.StreamHandler)]:
            logger.removeHandler(handler)
    root.setLevel(logging.WARNING)
    if name not in ("default", "meanwhile"):
        ours.setLevel(logging.NOTSET)
    seen[name] = {"users": stream.getvalue().splitlines(), "ours": errors.getvalue().splitlines()}

MANUAL = {"policy": "manual", "total_steps": 4}
AUTO = {"policy": "attention", "warmup_steps": 100}
with case("default"):
    run(MANUAL, 4, by_hand)
with case("info", lambda stream: (root.addHandler(users(stream)), root.setLevel(logging.INFO))):
    run(MANUAL, 4, by_hand)
with case("warning", lambda stream: root.addHandler(users(stream))):
    run(AUTO, 4)
with case("level", lambda stream: ours.setLevel(logging.WARNING)):
    run(AUTO, 4)
with case("own", lambda stream: (ours.addHandler(users(stream)), ours.setLevel(logging.INFO))):
    run(MANUAL, 4, by_hand)
with case("muted", lambda stream: setattr(ours, "propagate", False)):
    run(MANUAL, 4, by_hand)
ours.propagate = True
with case("meanwhile") as stream:
    def act(step, controller):
        by_hand(step, controller)
        if step == 2:
            root.addHandler(users(stream))
            root.setLevel(logging.INFO)
    run(MANUAL, 4, act)
with case("null"):
    run({"policy": "attention", "total_steps": None}, 2)
with case("judged"):
    run({"policy": "attention", "attention": {"threshold": 0.9999}, "window": 12, "snapshot_interval": 1, "freeze_interval": 6,
         "warmup_steps": 6, "total_steps": 40}, 24)
with case("drift"):
    run({"policy": "weight_drift", "weight_drift": {"threshold": 1e-9, "start_step": 0}, "snapshot_interval": 1, "freeze_interval": 2,
         "warmup_steps": 0, "total_steps": 20}, 6)
with case("short"):
    run(AUTO | {"total_steps": 20}, 20)
with case("dry"):
    run({"policy": "linear", "linear": {"start_step": 1, "end_step": 4}, "warmup_steps": 0, "snapshot_interval": 1, "freeze_interval": 1,
         "total_steps": 9, "dry_run": True}, 3)
with case("silent"):
    run(MANUAL | {"enabled": False}, 2)
kept = []
run(MANUAL, 2, ends=False)  # dropped, as a local variable of main()
run(MANUAL, 2, lambda step, controller: kept.append(controller), ends=False)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    path = f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, env=environment() | {"PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"at exit": done.stderr.splitlines()}


ON, FROZE, END = "smartfrz: on (torch, 1 rank)", "smartfrz: step 2: froze embeddings, blocks.0 (manual)", "smartfrz: end at step 4"


def said(lines: list[str], *texts: str) -> bool:
    """These texts, one in each line, and no other line."""
    return len(lines) == len(texts) and all(text in line for text, line in zip(texts, lines, strict=True))


def test_without_any_configuration_the_lines_are_seen(alone: dict[str, Any]) -> None:
    assert said(alone["default"]["ours"], ON, FROZE, END), alone["default"]
    assert (
        "no log (smartfrz.log_path is not set)" in alone["default"]["ours"][0]
        and "4 steps (smartfrz.total_steps)" in alone["default"]["ours"][0]
    )
    lines = alone["at exit"]
    assert sum(ON in line for line in lines) == 2
    assert sum("end at step 2 of 4: nothing was frozen: the policy is manual" in line for line in lines) == 2 and len(lines) == 4, lines


def test_the_users_configuration_counts(alone: dict[str, Any]) -> None:
    assert said(alone["info"]["users"], ON, FROZE, END) and not alone["info"]["ours"]
    assert all(line.startswith("INFO smartfrz_ds smartfrz: ") for line in alone["info"]["users"])
    unknown = "WARNING smartfrz_ds smartfrz: the length of the run is unknown"
    assert said(alone["warning"]["users"], unknown) and not alone["warning"]["ours"], alone["warning"]
    assert said(alone["level"]["ours"], 'Set "total_steps" in the "smartfrz" section')
    assert said(alone["own"]["users"], ON, FROZE, END) and not alone["own"]["ours"]
    assert not alone["muted"]["ours"]


def test_logging_that_is_configured_meanwhile_doubles_nothing(alone: dict[str, Any]) -> None:
    assert said(alone["meanwhile"]["ours"], ON, FROZE) and said(alone["meanwhile"]["users"], END), alone["meanwhile"]


def test_a_length_that_is_meant_to_be_unknown_is_no_warning(alone: dict[str, Any]) -> None:
    assert said(alone["null"]["ours"], "length of the run unknown (smartfrz.total_steps is null)", "end at step 2: nothing was frozen"), (
        alone["null"]
    )


def test_why_nothing_froze(alone: dict[str, Any]) -> None:
    ends = {name: alone[name]["ours"][-1].partition("smartfrz: ")[2] for name in ("judged", "drift", "short", "dry")}
    assert re.fullmatch(
        r"end at step 24 of 40: nothing was frozen: the policy attention was asked at 4 freezing stages; the most certain layer was \S+ "
        r"with probability 0\.\d{3} at step \d+, the threshold is 1\.000",
        ends["judged"],
    ), ends
    assert re.search(
        r"weight_drift was asked at 3 freezing stages and named no layer; at the last, embeddings: moved by \S+ of its size", ends["drift"]
    )
    assert "no freezing stage came: the run had 20 steps, the first stage would be at step 100" in ends["short"], ends
    assert "the run ends before the first freezing stage, step 100" in alone["short"]["ours"][0]
    assert "a dry run: nothing was frozen; the policy linear would have frozen embeddings" in ends["dry"], ends
    assert any("step 1: dry run, would freeze embeddings (policy linear" in line for line in alone["dry"]["ours"]), alone["dry"]
    assert not alone["silent"]["ours"]
    assert alone["outcomes"][8] in alone["judged"]["ours"][-1]


# ---- the sentence itself


def sentence(stages: Stages, *events: FreezeEvent, **more: Any) -> str:
    usual: dict[str, Any] = {"step": 100, "layers": ("a", "b", "c", "head"), "frozen": (), "policy": "attention", "threshold": 0.9}
    return outcome(stages=stages, events=events, **usual | more)


def test_a_certain_layer_that_had_to_wait_for_one_in_front() -> None:
    stages = Stages()
    stages.judged(50, (), {"a": 0.4, "b": 0.5, "c": 0.95}, {})
    stages.judged(60, (), {"a": 0.45, "b": 0.5, "c": 0.7}, {"c": "still moving"})
    assert stages == Stages.from_state(json.loads(json.dumps(stages.state_dict())))
    assert sentence(stages).endswith("c with probability 0.950 at step 50, the threshold is 0.900, but a in front of it was at 0.400")
    free = Stages()
    free.judged(50, (), {"a": 0.4, "c": 0.95}, {"c": "converged at 1 of 2 stages"}, ordered=False)
    assert sentence(free).endswith("the threshold is 0.900 (converged at 1 of 2 stages)")


def test_stages_at_which_nothing_could_be_judged() -> None:
    stages = Stages()
    assert "at no freezing stage" in sentence(stages, first_stage=10)
    stages.judged(10, (), {}, {}, failed=True)
    assert "failed at each" in sentence(stages)
    stages.judged(20, (), {"a": float("nan")}, {})
    assert sentence(stages).endswith("2 freezing stages and named no layer")
    assert sentence(Stages(), first_stage=100, total_steps=100).endswith("at step 100, its last, at which nothing is decided")


def test_freezes_that_were_undone_are_told() -> None:
    why = "freeze failed and was undone on every rank: rank 1: MemoryError: no room"
    undone = FreezeEvent(kind="undone", step=10, layers=("a",), message=why)
    assert sentence(Stages(), undone) == f"nothing was frozen: 1 freeze failed and was undone; step 10: {why}"
    later = FreezeEvent(kind="freeze", step=12, layers=("a",), frozen=("a",))
    assert sentence(Stages(), undone, later, frozen=("a",)) == "froze a at step 12; 1 of 4 layers frozen now: a"


def test_a_freeze_that_was_taken_back_is_told() -> None:
    freeze = FreezeEvent(kind="freeze", step=10, layers=("a",), frozen=("a",))
    thaw = FreezeEvent(kind="thaw", step=14, layers=("a",), reasons={"a": "guard: the smoothed metric is 2"})
    assert sentence(Stages(), freeze, thaw) == "froze a at step 10; 1 thaw, 1 of them by the guard; 0 of 4 layers frozen now"
    many = [FreezeEvent(kind="freeze", step=s, layers=("a",)) for s in range(1, 9)]
    assert "… in 8 freezes" in sentence(Stages(), *many, frozen=("a",))
