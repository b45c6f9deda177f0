"""Mode `budget` on real runs: what it saves, and what its note says, with the run's own losses and without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import oracle
from reference.oracle import Cell

import smartfrz_ds
from smartfrz_ds.bench.policies.files import POLICIES_FILE, find_tasks, read_policies
from smartfrz_ds.bench.policies.runs import Job, resolve
from smartfrz_ds.bench.policies.setups.prepare import prepare
from smartfrz_ds.bench.policies.worker import alone, deepspeed_config, do_step, start_engine

STEPS = 40
BUDGET = {
    "policy": "attention", "attention": {"mode": "budget", "budget": 0.2}, "max_frozen_fraction": 1.0,
    "warmup_steps": 4, "snapshot_interval": 1, "freeze_interval": 2, "total_steps": STEPS,
}  # fmt: skip


def train(fed: bool) -> Any:
    model = Cell("budget").net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR)
    controller = smartfrz_ds.attach_torch(model, optimizer, BUDGET)
    for step in range(STEPS):
        loss = oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32")
        loss.backward()
        if fed:
            controller.record_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
    return controller


def test_a_run_that_reports_no_loss_saves_its_budget_and_says_so() -> None:
    report = train(fed=False).report()
    assert report.saved_flops_fraction == pytest.approx(0.2, abs=0.04)
    assert "costs unknown: no loss was reported" in report.policy_note


def test_where_freezing_costs_more_nothing_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = "smartfrz_ds.predictor.loss_curve"
    monkeypatch.setattr(f"{curve}.FREEZING", 0.0)  # free: all of the budget
    assert train(fed=True).report().saved_flops_fraction == pytest.approx(0.2, abs=0.04)
    monkeypatch.setattr(f"{curve}.FREEZING", 1e6)
    report = train(fed=True).report()
    early = [event.step for event in report.events if event.kind == "freeze"]
    assert early == [] and report.saved_flops_fraction == 0.0
    assert "better saved by fewer steps" in report.policy_note and "predicted loss" in report.policy_note


@pytest.mark.slow
@pytest.mark.distributed(1)
def test_a_deepspeed_engine_feeds_the_curve_by_itself(tmp_path: Path) -> None:
    task = find_tasks(["rescnn-mnist"])["rescnn-mnist"].model_copy(update={"steps": STEPS, "held_out": 32})
    section = resolve(read_policies(POLICIES_FILE).common, BUDGET, "attention", STEPS, 0, "test")
    job = Job(task="rescnn-mnist", settings=task, section=section, seed=0, zero_stage=0, predictor="")
    with torch.random.fork_rng(), alone():
        training = prepare(task, 0, tmp_path)
        engine = start_engine(job, training, deepspeed_config(task, 0))
        for _ in range(STEPS):
            do_step(engine, next(training.batches), training.objective)
        report = engine.smartfrz.report()
    assert report.saved_flops_fraction <= 0.24
    assert "predicted loss" in report.policy_note or "reached" in report.policy_note
    assert "no loss was reported" not in report.policy_note
