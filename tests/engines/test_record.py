"""The run's own record over checkpoints: what is kept, what is cut, and where. See worker_record.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import TESTS, environment, run_worker

from smartfrz_ds.telemetry.event_log import EventLog
from smartfrz_ds.telemetry.events import FreezeEvent, RunStart, read_events, read_log
from smartfrz_ds.telemetry.recorded_run import find_log, load_run

FRONT = ["embeddings", "blocks.0"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("record", None, tmp_path_factory.mktemp("record"))


def seen(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


FREEZE = ["freeze", 5, 0, FRONT, FRONT, ""]
LOADS = [
    ["load", 4, 7, FRONT, [], "4"],  # in front of the freeze: the layers train again
    ["load", 6, 6, [], [], "5, weights only"],
    ["load", 5, 6, FRONT, FRONT, "5"],
    ["load", 4, 5, FRONT, [], "4"],
]


@pytest.mark.distributed(2)
def test_a_rollback_keeps_what_was_and_says_so(ran: Path) -> None:
    for rank in range(2):
        facts = seen(ran, "rollback", rank)
        assert facts["events"] == [FREEZE, *LOADS]
        assert facts["back"] == {"frozen": [], "step": 4} and facts["files"] == ["log.jsonl"]
    assert seen(ran, "rollback")["log"] == [
        ["RunStart", 0], ["Status", 2], ["Status", 4], FREEZE, ["Status", 6], LOADS[0],
        ["RunStart", 4], ["Status", 6], *LOADS[1:], ["RunStart", 4]
    ]  # fmt: skip


@pytest.mark.distributed(2)
def test_the_report_shows_the_part_that_counts(ran: Path) -> None:
    run = load_run(ran / "rollback" / "log.jsonl")
    assert [s.step for s in run.statuses] == [2, 4] and run.last_step == 4 and not any(run.frozen_spans().values())
    assert (run.resumes, run.rollbacks, run.changes(), run.frozen) == (0, 2, [], ())
    assert [e.kind for e in run.events] == ["freeze", *["load"] * 4]  # in the table they are all


@pytest.mark.distributed(2)
def test_a_resume_cuts_the_log_and_keeps_a_copy(ran: Path) -> None:
    facts, freeze = seen(ran, "resumed"), ["freeze", 3, 0, FRONT, FRONT, ""]
    whole = [["RunStart", 0], ["Status", 2], freeze, ["Status", 4]]
    assert facts["looks"] == {"events": [], "log": whole, "files": ["resumed.jsonl"]}  # nothing happens again
    again = [["RunStart", 0], ["Status", 2], ["RunStart", 2], ["Status", 4]]
    assert facts["second"] == {"events": [], "log": again, "files": ["resumed.cut-2.jsonl", "resumed.jsonl"]}
    assert facts["third"]["log"] == again and facts["third"]["files"] == ["resumed.cut-2-2.jsonl", "resumed.cut-2.jsonl", "resumed.jsonl"]
    assert facts["copies"] == [again[2:], whole[2:]]
    assert find_log(ran / "resumed").name == "resumed.jsonl"  # the copies are no logs of other runs


@pytest.mark.distributed(2)
def test_two_engines_write_a_log_each_and_find_them_again(ran: Path) -> None:
    facts = seen(ran, "two")
    start = [["RunStart", 0], ["freeze", 3, 0, FRONT, FRONT, ""], ["RunStart", 3]]
    assert facts["files"] == ["log.2.cut-3.jsonl", "log.2.jsonl", "log.cut-3.jsonl", "log.jsonl"]
    assert [r for r in facts["logs"][0] if r[0] != "Status"] == start, facts
    assert [r for r in facts["logs"][1] if r[0] != "Status"] == [start[0], ["freeze", 3, 0, FRONT[:1], FRONT[:1], ""], start[2]], facts
    assert [Path(p).name for p in facts["paths"]] == ["log.jsonl", "log.2.jsonl"]
    assert seen(ran, "two", 1)["paths"] == ["", ""]


KILLED = """
import os, sys, warnings, torch, smartfrz_ds
from reference import oracle
from pathlib import Path
folder, ends = Path(sys.argv[1]), int(sys.argv[2])
made = []
for name in "ab":
    model = oracle.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"policy": "manual", "log_path": str(folder / "log.jsonl"), "status_interval": 100}
    controller = smartfrz_ds.attach_torch(model, optimizer, settings)
    if (folder / name).is_dir():
        controller.restore(folder / name)
        optimizer.load_state_dict(torch.load(folder / name / "optimizer.pt"))
    made.append((name, model, optimizer, controller))
while made[0][3].step < ends:
    for name, model, optimizer, controller in made:
        optimizer.zero_grad()
        oracle.loss_of(model, *oracle.data(controller.step, 0, 0), "fp32").backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.step in (2, 4):
            controller.freeze(controller.layers[: controller.step // 2 + (name == "b")])
        if controller.step == 3:
            controller.save(folder / name)
            torch.save(optimizer.state_dict(), folder / name / "optimizer.pt")
        if controller.step == 5 and ends == 5:
            controller.restore(folder / name)  # a rollback
            assert [e.kind for e in controller.report().events] == ["freeze", "freeze", "load"]
            optimizer.load_state_dict(torch.load(folder / name / "optimizer.pt"))
            if name == "b":
                os._exit(9)
"""


def test_killed_and_resumed_without_deepspeed(tmp_path: Path) -> None:
    """Two controllers, killed in the step after a rollback; each finds its own log again, and what is cut is kept."""
    for ends, code in ((5, 9), (6, 0)):
        command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), str(ends)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment() | {"PYTHONPATH": paths()}, check=False)
        assert done.returncode == code, done.stderr
    for name, first in (("log", 1), ("log.2", 2)):
        events = read_events(tmp_path / f"{name}.jsonl")
        assert [(e.kind, e.step, len(e.layers)) for e in events] == [("freeze", 2, first), ("freeze", 4, 1)]
        assert [r.step for r in read_log(tmp_path / f"{name}.jsonl") if isinstance(r, RunStart)] == [0, 3]
        lost = read_events(tmp_path / f"{name}.cut-3.jsonl")
        assert [(e.kind, e.step, e.from_step) for e in lost] == [("freeze", 4, 0), ("load", 3, 5)]
    assert load_run(tmp_path / "log.jsonl").resumes == 1


def paths() -> str:
    return f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)


# ---- what is read


def log_of(path: Path, *records: Any) -> Path:
    log = EventLog(path)
    for record in records:
        log.write(record)
    return path


def start(step: int, *frozen: str) -> RunStart:
    return RunStart(step=step, time=1.0, layers=("a", "b", "head"), kinds=("block", "block", "head"), weights=(1, 1, 1), frozen=frozen)


def freeze(step: int, *frozen: str) -> FreezeEvent:
    return FreezeEvent(kind="freeze", step=step, layers=frozen[-1:], frozen=frozen)


def load(step: int, from_step: int, *frozen: str, message: str = "checkpoint x") -> FreezeEvent:
    return FreezeEvent(kind="load", step=step, from_step=from_step, frozen=frozen, message=message)


def test_loads_and_later_runs_in_one_file(tmp_path: Path) -> None:
    """A load at the end of a run doesn't make the next run in the file a rollback of it; a rollback to step 0 is no new run."""
    ended = [start(0), freeze(4, "a"), freeze(8, "a", "b"), load(4, 8, "a")]
    run = load_run(log_of(tmp_path / "end.jsonl", *ended))
    assert run.last_load is not None and run.last_step == 8 and run.frozen == ("a", "b") and run.rollbacks == 0
    new = load_run(log_of(tmp_path / "new.jsonl", *ended, start(0)))
    assert (new.last_step, new.events, new.rollbacks) == (0, [], 0) and "1 earlier run" in new.notes[0]
    resumed = load_run(log_of(tmp_path / "resumed.jsonl", *ended, start(8, "a", "b"), freeze(9, "a", "b")))
    assert (resumed.resumes, resumed.rollbacks, resumed.frozen_spans()["a"]) == (1, 0, [(4, 9)])
    zero = load_run(log_of(tmp_path / "zero.jsonl", *ended[:2], load(0, 5), start(0), freeze(3, "a")))
    assert (zero.rollbacks, zero.frozen_spans()["a"], len(zero.events)) == (1, [(3, 3)], 3)
    weights = load(6, 6, "a", message="checkpoint x, weights only")
    only = load_run(log_of(tmp_path / "only.jsonl", *ended[:2], weights, freeze(8, "a", "b")))
    assert (only.last_load, only.frozen, only.rollbacks) == (None, ("a", "b"), 0)


def test_a_log_of_another_run_is_not_cut(tmp_path: Path) -> None:
    """Another file in its place, with a line that ends at the same byte."""
    log = EventLog(log_of(tmp_path / "log.jsonl", freeze(4, "a"), freeze(5, "b")))
    position = log.position
    mark = log.mark(position)
    log_of(tmp_path / "log.jsonl", freeze(6, "a"))
    other = (tmp_path / "log.jsonl").read_text().replace('"step": 4', '"step": 3')
    (tmp_path / "log.jsonl").write_text(other)
    with pytest.warns(RuntimeWarning, match="does not belong to this checkpoint"):
        assert log.truncate_to(position, mark, copy=tmp_path / "copy.jsonl") is None
    assert (tmp_path / "log.jsonl").read_text() == other and not (tmp_path / "copy.jsonl").exists()


def test_without_room_for_the_copy_nothing_is_cut(tmp_path: Path) -> None:
    log = EventLog(log_of(tmp_path / "log.jsonl", freeze(4, "a"), freeze(5, "b")))
    with pytest.warns(RuntimeWarning, match="could not be cut back"):
        log.truncate_to(0, copy=tmp_path / "missing" / "copy.jsonl")
    assert [e.step for e in read_events(tmp_path / "log.jsonl")] == [4, 5]
