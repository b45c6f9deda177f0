import csv
import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import environment

from smartfrz_ds.telemetry.event_log import EventLog
from smartfrz_ds.telemetry.events import FreezeEvent, RunStart, Status, is_log, read_events, read_log

FREEZE = FreezeEvent(
    kind="freeze",
    step=150,
    layers=("encoder.layer.0",),
    frozen=("embeddings", "encoder.layer.0"),
    probabilities={"encoder.layer.0": 0.97, "encoder.layer.1": 0.25},
    reasons={"encoder.layer.0": "probability 0.97 >= 0.9, twice"},
    bytes_released=1000,
    bytes_released_total=2000,
    seconds=0.125,
)
DECISION = FreezeEvent(kind="decision", step=200, layers=("é",), probabilities={"é": math.nan}, dry_run=True)
THAW = FreezeEvent(kind="thaw", step=250, layers=("encoder.layer.0",), frozen=("embeddings",), bytes_released=-7, bytes_released_total=-14)
WARNING = FreezeEvent(kind="warning", step=300, message="the policy raised:\nZeroDivisionError")
START = RunStart(step=0, time=1.5e9, layers=("embeddings", "head"), kinds=("embedding", "head"), weights=(20, 8), policy="linear", ranks=2)
STATUS = Status(
    step=350,
    time=1.5e9 + 60,
    loss=0.5,
    step_seconds=0.25,
    frozen=("embeddings",),
    optimizer_bytes=4000,
    gradient_bytes=1000,
    saved_flops_fraction=0.125,
    hours_saved=None,
    lr=1e-4,
    metrics={"loss": 0.5, "accuracy": 0.75},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "log.jsonl"
    log = EventLog(path)
    for event in (FREEZE, THAW, WARNING):
        log.write(event)
        assert read_events(path)[-1] == event  # there when write returns
    assert read_events(path) == [FREEZE, THAW, WARNING]
    assert len(path.read_text().splitlines()) == 3


def test_nan_stays_standard_json_and_comes_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    log.write(DECISION)
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["probabilities"] == {"é": None}
    (event,) = read_events(tmp_path / "log.jsonl")
    assert math.isnan(event.probabilities["é"]) and event.dry_run


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = EventLog(None)
    log.write(FREEZE)
    log.truncate_to(5)
    assert log.position == 0
    assert list(tmp_path.iterdir()) == []


def test_another_run_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    EventLog(path).write(FREEZE)
    EventLog(path).write(THAW)
    assert read_events(path) == [FREEZE, THAW]


def test_status_lines_stand_between_the_events(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = EventLog(path)
    for record in (START, FREEZE, STATUS, THAW):
        log.write(record)
    assert read_log(path) == [START, FREEZE, STATUS, THAW]
    assert read_events(path) == [FREEZE, THAW]
    assert is_log(path)
    with path.open("ab") as file:
        file.write(b'{"kind": "status", "step": 4')
    EventLog(path).write(WARNING)  # cuts the torn line
    assert read_log(path)[-2:] == [THAW, WARNING]


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    EventLog(path).write(dataclasses.replace(STATUS, loss=math.nan, metrics={"loss": math.inf}))
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert read_log(path) == [dataclasses.replace(STATUS, loss=None, metrics={"loss": None})]


def test_a_log_of_the_first_version_is_read_and_continued(tmp_path: Path) -> None:
    """Word for word a line that 0.1.0 wrote before there were status lines."""
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"kind": "freeze", "step": 150, "layers": ["encoder.layer.0"], "frozen": ["embeddings", "encoder.layer.0"], "probabilities": '
        '{"encoder.layer.0": 0.97, "encoder.layer.1": 0.25}, "reasons": {"encoder.layer.0": "probability 0.97 >= 0.9, twice"}, '
        '"bytes_released": 1000, "bytes_released_total": 2000, "seconds": 0.125, "predicted_seconds": 0.0, "moved_bytes": 0, '
        '"dry_run": false, "message": ""}\n'
    )
    assert read_events(path) == [FREEZE]
    EventLog(path).write(STATUS)
    assert read_log(path) == [FREEZE, STATUS]


def test_weights_and_biases_gets_samples_the_others_steps() -> None:
    """W&B drops what comes with a smaller count than the last one, and DeepSpeed counts samples there (runtime/engine.py)."""

    class Master:
        enabled = True

        def __init__(self) -> None:
            self.tb_monitor, self.csv_monitor, self.comet_monitor, self.wandb_monitor = Seen(), Seen(), None, Seen()

        def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
            pytest.fail("each for itself")

    class Seen:
        def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
            self.at = {step for _, _, step in event_list}

    master = Master()
    EventLog(None, master, samples=lambda: 350 * 16).write(STATUS)
    assert (master.tb_monitor.at, master.csv_monitor.at, master.wandb_monitor.at) == ({350}, {350}, {350 * 16})


# ---- crashes


def test_torn_last_line_is_skipped_at_every_byte_and_cut_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = EventLog(path)
    log.write(FREEZE)
    whole = log.position
    log.write(THAW)
    data = path.read_bytes()
    for size in range(whole + 1, len(data)):
        path.write_bytes(data[:size])
        with pytest.warns(RuntimeWarning, match=rf"torn last line \({size - whole} bytes\)"):
            assert read_events(path) == [FREEZE]
        EventLog(path).write(WARNING)
        assert read_events(path) == [FREEZE, WARNING]


@pytest.mark.parametrize("size", [1, 5, 10, 60])
def test_torn_only_line_is_cut_by_the_next_run(tmp_path: Path, size: int) -> None:
    path = tmp_path / "log.jsonl"
    EventLog(path).write(FREEZE)
    path.write_bytes(path.read_bytes()[:size])
    EventLog(path).write(THAW)
    assert read_events(path) == [THAW]


def test_zeros_after_a_power_failure_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = EventLog(path)
    log.write(FREEZE)
    path.write_bytes(path.read_bytes() + b"\0" * 40 + b"\n")
    with pytest.warns(RuntimeWarning, match="torn"):
        assert read_events(path) == [FREEZE]


def test_a_foreign_line_is_skipped_with_a_warning_that_has_its_number(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = EventLog(path)
    log.write(FREEZE)
    path.write_bytes(path.read_bytes() + b'{"kind": "melt"}\n')
    with path.open("ab") as file:
        file.write((json.dumps(THAW.to_json()) + "\n").encode())
    with pytest.warns(RuntimeWarning, match="skipped line 2, which is not a record"):
        assert read_events(path) == [FREEZE, THAW]


def test_killed_writer_leaves_only_whole_events(tmp_path: Path) -> None:
    """SIGKILL at any moment of a busy writer: every event it reported as written is there, in order."""
    path = tmp_path / "log.jsonl"
    code = (
        "import sys; from pathlib import Path; from smartfrz_ds.telemetry.event_log import EventLog, FreezeEvent\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for step in range(10**6):\n"
        "    log.write(FreezeEvent(kind='warning', step=step, message='x' * 3000))\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "20":
            break
    time.sleep(0.013)
    os.kill(process.pid, signal.SIGKILL)
    reported = [20, *(int(line) for line in process.stdout.read().split("\n")[:-1])]
    process.wait()
    process.stdout.close()
    EventLog(path)  # cuts what may be torn
    steps = [event.step for event in read_events(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > reported[-1]


def test_full_disk_warns_and_leaves_no_half_line(tmp_path: Path) -> None:
    """The limit on file size makes the kernel write a part of the line and then refuse, as a full disk does."""
    path = tmp_path / "log.jsonl"
    log = EventLog(path)
    log.write(FREEZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.position + 20, before[1]))
        with pytest.warns(RuntimeWarning, match="could not write an event of step 250 to the log"):
            log.write(THAW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_events(path) == [FREEZE]
    log.write(WARNING)
    assert read_events(path) == [FREEZE, WARNING]


@pytest.mark.parametrize("text", ["print('my script')\n", "no newline at the end", '{"kind": "else"}\n{"kind": "torn', '{"a": 1}\n'])
def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"smartfrz\.log_path: got .*train\.py.*not a smartfrz log"):
        EventLog(path)
    assert path.read_text() == text


def test_a_path_that_cannot_be_written_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "log.jsonl"):
        with pytest.raises(ValueError, match=r"smartfrz\.log_path"):
            EventLog(path)


# ---- resume


def test_resume_drops_what_will_happen_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = EventLog(path)
    positions = [log.position]
    for event in (FREEZE, THAW, WARNING):
        log.write(event)
        positions.append(log.position)
    again = EventLog(path)
    again.truncate_to(positions[3])
    assert read_events(path) == [FREEZE, THAW, WARNING]
    again.truncate_to(positions[1])
    again.write(WARNING)
    assert read_events(path) == [FREEZE, WARNING]
    again.truncate_to(positions[0])
    assert read_events(path) == []


@pytest.mark.parametrize("offset", [-3, 10])
def test_position_of_another_file_warns_and_cuts_nothing(tmp_path: Path, offset: int) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    log.write(FREEZE)
    with pytest.warns(RuntimeWarning, match="does not belong to this checkpoint"):
        log.truncate_to(log.position + offset)
    assert read_events(tmp_path / "log.jsonl") == [FREEZE]


# ---- the monitor

MONITOR_CODE = """
import sys
import deepspeed
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from smartfrz_ds.telemetry.event_log import EventLog
sys.path.insert(0, sys.argv[2])
from test_events import FREEZE, DECISION, THAW, WARNING, START, STATUS
deepspeed.init_distributed("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1, verbose=False, auto_mpi_discovery=False)
for job, enabled in (("on", True), ("off", False)):
    settings = get_monitor_config({"csv_monitor": {"enabled": enabled, "output_path": sys.argv[1], "job_name": job}})
    log = EventLog(None, MonitorMaster(settings))
    for event in (FREEZE, DECISION, THAW, WARNING, START, STATUS):
        log.write(event)
"""


def test_deepspeeds_csv_monitor_gets_the_numbers(tmp_path: Path) -> None:
    env = {**environment(), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    args = [sys.executable, "-c", MONITOR_CODE, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(args, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr

    def rows(name: str) -> list[tuple[int, float]]:
        with (tmp_path / "on" / f"smartfrz_{name}.csv").open() as file:
            header, *rest = csv.reader(file)
        assert header[0] == "step"
        return [(int(step), float(value)) for step, value in rest]

    assert rows("frozen_layers") == [(150, 2), (200, 0), (250, 1), (350, 1)]
    assert rows("optimizer_bytes") == [(350, 4000)]
    assert rows("gradient_bytes") == [(350, 1000)]
    assert rows("saved_flops_fraction") == [(350, 0.125)]
    assert rows("step_seconds") == [(350, 0.25)]
    assert rows("bytes_released") == [(150, 2000), (250, -14)]
    assert rows("freeze_seconds") == [(150, 0.125), (250, 0)]
    assert rows("probability_encoder.layer.0") == [(150, 0.97)]
    assert rows("probability_encoder.layer.1") == [(150, 0.25)]
    assert len(list((tmp_path / "on").iterdir())) == 9  # NaN and what is not known go to no monitor
    assert not (tmp_path / "off").exists()
