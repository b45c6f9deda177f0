"""Status lines of real 2-rank engines: what they say is what the ranks did. See worker_status.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from helpers import run_worker
from reference.bounds import rounding

from smartfrz_ds.planner import Cluster, LayerCost
from smartfrz_ds.planner.memory import rank_memory
from smartfrz_ds.telemetry.events import FreezeEvent, RunStart, Status, read_log

pytestmark = pytest.mark.distributed(2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("status", None, tmp_path_factory.mktemp("status"))


@pytest.mark.parametrize("name", ["z0-fp32", "z1-fp32", "z1-bf16opt", "z2-bf16", "z3-fp32"])
def test_status_says_what_the_ranks_did(ran: Path, name: str) -> None:
    truth = json.loads((ran / f"{name}.0.json").read_text())
    start, *rest = read_log(ran / f"{name}.jsonl")
    assert isinstance(start, RunStart)
    assert (start.step, start.ranks, start.policy, start.layers[0], start.layers[-1]) == (0, 2, "manual", "embeddings", "head")
    assert start.kinds == ("embedding", *["block"] * 5, "head") and sum(start.weights) == 128 + 5 * 1632 + 51
    statuses = [record for record in rest if isinstance(record, Status)]
    (freeze,) = (record for record in rest if isinstance(record, FreezeEvent))
    assert [status.step for status in statuses] == [3, 6, 9]
    assert [len(status.frozen) for status in statuses] == [0, 3, 3]
    for status, real in zip(statuses, truth, strict=True):
        assert status.loss == pytest.approx(real["loss"], rel=rounding(2 * 2, 1.0))  # of two micro-batches and ranks
        assert status.optimizer_bytes == real["held"]
        assert status.gradient_bytes is not None and status.step_seconds is not None
        # what was handed over has padding in it, at most some elements a parameter
        assert status.gradient_bytes <= real["reduced"] <= 1.05 * status.gradient_bytes + 2048, name
        assert 0.02 <= status.step_seconds <= real["seconds"][-1] + 1  # the pause for data is in it, this package's hooks are not
        assert status.lr == 1e-2
    before, after = statuses[0], statuses[2]
    assert before.optimizer_bytes - after.optimizer_bytes == freeze.bytes_released_total
    assert before.gradient_bytes is not None and after.gradient_bytes is not None and after.gradient_bytes < 0.7 * before.gradient_bytes
    assert (before.saved_flops_fraction, before.hours_saved is not None) == (0.0, True)
    assert 0 < statuses[1].saved_flops_fraction < after.saved_flops_fraction < 0.5


@pytest.mark.parametrize(("name", "zero", "state_bytes"), [("z0-fp32", 0, 8), ("z1-fp32", 1, 12), ("z2-bf16", 2, 12), ("z3-fp32", 3, 12)])
def test_the_planned_memory_is_what_the_ranks_hold(ran: Path, name: str, zero: int, state_bytes: int) -> None:
    """`smartfrz plan`'s optimizer column against the live tensors of both ranks, before and after the freeze of the front layers."""
    start, *rest = read_log(ran / f"{name}.jsonl")
    assert isinstance(start, RunStart)
    costs = [LayerCost(forward=0, backward_input=0, backward_weight=0, weights=count) for count in start.weights]
    cluster = Cluster(replicas=start.ranks, zero=zero, state_bytes=state_bytes)
    for record in (record for record in rest if isinstance(record, Status)):
        (rank,) = rank_memory(costs, [0, len(costs)], 1, len(record.frozen), cluster=cluster)
        planned = start.ranks * rank.optimizer
        # The partitions have padding, and a step count for each tensor.
        assert planned <= record.optimizer_bytes <= 1.02 * planned + 2048, (name, record.step)


def test_csv_monitor_of_a_real_engine_gets_the_status(ran: Path) -> None:
    with (ran / "csv-z2-bf16" / "smartfrz_optimizer_bytes.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    statuses = [record for record in read_log(ran / "z2-bf16.jsonl") if isinstance(record, Status)]
    assert [(int(step), float(value)) for step, value in rows] == [(status.step, status.optimizer_bytes) for status in statuses]
    assert (ran / "csv-z2-bf16" / "smartfrz_hours_saved.csv").exists()


def test_resumed_run_writes_a_start_and_goes_on_in_the_log(ran: Path) -> None:
    records = read_log(ran / "resumed.jsonl")
    # what the first run did after its checkpoint is gone: it happens again
    assert [(type(record).__name__, record.step) for record in records] == [
        ("RunStart", 0), ("Status", 2), ("Status", 4), ("RunStart", 4), ("Status", 6), ("Status", 8)
    ]  # fmt: skip
    assert isinstance(records[3], RunStart) and records[3].frozen == ()


def test_nobody_pays_for_a_status_that_nobody_reads(ran: Path) -> None:
    often, never = json.loads((ran / "quiet.0.json").read_text())
    assert often == never and sum(often.values()) > 0
