import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smartfrz_ds.cli import doctor_config
from smartfrz_ds.cli.main import app
from smartfrz_ds.predictor.model import load_predictor
from smartfrz_ds.telemetry.event_log import EventLog
from smartfrz_ds.telemetry.events import FreezeEvent, RunStart, Status


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_version() -> None:
    code, out, _ = run("--version")
    assert code == 0
    installed, tested = out.splitlines()
    assert installed.startswith(f"smartfrz {version('smartfrz_ds')} (deepspeed {version('deepspeed')}")
    assert tested.startswith("tested with DeepSpeed 0.16.4 to 0.19.8 except 0.17.*, 0.18.0")
    assert tested.endswith("; torch 2.13 or later, before 2.15")


@pytest.mark.parametrize(
    ("args", "words"), [((), "check-config"), (("check-config",), "DeepSpeed JSON"), (("train-predictor",), "--cache")]
)
def test_help(args: tuple[str, ...], words: str) -> None:
    code, out, _ = run(*args, "--help")
    assert code == 0
    assert words in out


def test_commands_that_need_no_torch_do_not_import_it(tmp_path: Path) -> None:
    """Background: `smartfrz --help` took longer than `import torch`, because a command's default came from a module that imports it."""
    config = Path(__file__).parents[2] / "configs" / "zero2.json"
    log = EventLog(tmp_path / "log.jsonl")
    log.write(RunStart(step=0, time=0.0, layers=("a", "b"), kinds=("block", "block"), weights=(4, 4)))
    log.write(FreezeEvent(kind="freeze", step=5, layers=("a",), frozen=("a",), probabilities={"a": 0.9}))
    log.write(Status(step=10, time=1.0, loss=0.5, step_seconds=0.1, frozen=("a",), optimizer_bytes=8, gradient_bytes=8))
    code = """
import sys
from typer.testing import CliRunner
from smartfrz_ds.cli.main import app

config, run_dir = sys.argv[1:]
heavy = {"torch", "deepspeed", "transformers", "numpy", "matplotlib"}
missing = ["report", run_dir + "/none"]  # an error that is found before anything is drawn
calls = [["--help"], ["report", "--help"], missing, ["--version"], ["train-predictor", "--help"], ["check-config", config]]
calls += [["plan", "--layers", "4"], ["report", run_dir]]
for args in calls:
    if args == ["report", run_dir]:
        heavy -= {"numpy", "matplotlib"}  # it draws
    result = CliRunner().invoke(app, args)
    assert result.exit_code == (2 if args is missing else 0), (args, result.output)
    loaded = heavy & sys.modules.keys()
    assert not loaded, (args, loaded)
    if args is missing:
        rooms = {m.split(".")[1] for m in sys.modules if m.startswith("smartfrz_ds.")}
        assert rooms <= {"_version", "cli", "predictor", "telemetry"}, rooms  # predictor: a constant
    print(args[0])
"""
    command = [sys.executable, "-c", code, str(config), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["report"]), done.stderr
    assert (tmp_path / "report" / "report.html").is_file()


def test_check_config_prints_what_a_run_would_use(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 8, "smartfrz": {"policy": "linear", "linear": {"end_step": 90}, "window": 30}}')
    code, out, _ = run("check-config", str(file))
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["smartfrz.policy", '"linear"'] in lines
    assert ["smartfrz.linear.end_step", "90"] in lines
    assert ["smartfrz.window", "30", "(default)"] in lines
    assert "attention" not in out  # of another policy
    assert out.splitlines()[-1] == f"{file}: ok"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"attention": {"predictor": "no.safetensors"}}, "smartfrz.attention.predictor: no.safetensors: no such file; allowed:"),
        ({"log_path": "/proc/none/log.jsonl"}, 'smartfrz.log_path: got "/proc/none/log.jsonl"; allowed: a writable path'),
        ({"log_path": __file__}, "it exists and is not a smartfrz log"),
    ],
)
def test_what_stops_a_run_at_its_start_stops_the_checks_before(section: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 8, "smartfrz": {"total_steps": 400, **section}}))
    code, out, err = run("check-config", str(file))
    assert (code, out) == (2, "") and words in err
    assert words in "\n".join(one.text for one in doctor_config.check_config(file)[0] if one.level == "problem")
    with pytest.raises(ValueError, match=re.escape(words)):  # the start
        if "attention" in section:
            load_predictor(section["attention"]["predictor"])
        else:
            EventLog(Path(section["log_path"]))


def test_a_log_that_can_be_written_is_not_made_by_the_check(tmp_path: Path) -> None:
    file, log = tmp_path / "ds.json", tmp_path / "new" / "log.jsonl"
    file.write_text(json.dumps({"smartfrz": {"total_steps": 400, "log_path": str(log)}}))
    assert run("check-config", str(file))[0] == 0
    assert os.listdir(tmp_path) == ["ds.json"]
    EventLog(log).write(RunStart(step=0, time=0.0, layers=("a",), kinds=("block",), weights=(4,)))
    before = log.read_bytes()
    assert run("check-config", str(file))[0] == 0
    assert log.read_bytes() == before


@pytest.mark.parametrize(("name", "language"), [("ds.yaml", "YAML"), ("ds.yml", "YAML"), ("ds.py", "Python")])
def test_a_file_in_another_language_is_named(name: str, language: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text("train_batch_size: 8\nsmartfrz:\n  policy: linear\n")
    code, _, err = run("check-config", str(file))
    assert (code, err) == (
        2,
        f"error: {file}: not a readable DeepSpeed JSON: it is named as a {language} file; allowed: JSON, as DeepSpeed reads it\n",
    )


def test_check_config_shows_what_was_set_in_other_sections(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"smartfrz": {"total_steps": 400, "cache": {"mode": "auto"}, "guard": {"metric": "loss"}}}')
    lines = [line.split() for line in run("check-config", str(file))[1].splitlines()]
    assert ["smartfrz.cache.mode", '"auto"'] in lines
    assert ["smartfrz.guard.metric", '"loss"'] in lines
    assert not any(line[0].startswith(("smartfrz.cache.memory", "smartfrz.linear")) for line in lines)


def test_check_config_says_when_freezing_is_off(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"smartfrz": {"enabled": false}}')
    assert run("check-config", str(file))[1].splitlines()[-1] == f"{file}: ok, freezing is disabled"


def test_check_config_lists_all_problems(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"smartfrz": {"window": 1, "polcy": "linear"}}')
    code, out, err = run("check-config", str(file))
    assert (code, out) == (2, "")
    assert err.startswith("error: smartfrz.window: got 1; allowed: an integer >= 2\nsmartfrz.polcy: unknown key; did you mean 'policy'?")


def test_installed_command_ends_without_a_traceback() -> None:
    command = Path(sys.executable).with_name("smartfrz")
    result = subprocess.run([command, "check-config", "no/such.json"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == "error: no/such.json: not a readable DeepSpeed JSON: no such file"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args", [["--out", "weights.bin"], ["--out", "w.safetensors", "--seed", "-1"], ["--out", "w.safetensors", "--seed", "x"], []]
)
def test_train_predictor_refuses_bad_arguments(args: list[str]) -> None:
    code, out, err = run("train-predictor", *args)
    assert (code, out) == (2, "")
    assert "--out" in err or "--seed" in err


def test_report_names_its_page_or_what_is_wrong(tmp_path: Path) -> None:
    EventLog(tmp_path / "log.jsonl").write(FreezeEvent(kind="freeze", step=5, layers=("a",), frozen=("a",)))
    code, out, _ = run("report", str(tmp_path), "--output", str(tmp_path / "there"))
    assert (code, out.strip()) == (0, str(tmp_path / "there" / "report.html"))
    assert (tmp_path / "there" / "frozen.png").exists()
    code, _, err = run("report", str(tmp_path / "there"))
    assert code == 2 and "no smartfrz log found" in err


def test_doctor_exits_with_one_for_a_problem_and_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "ds.json"
    file.write_text('{"optimizer": {"type": "OneBitAdam"}}')
    code, out, _ = run("doctor", str(file), "--json")
    found = json.loads(out)
    assert code == 1 and found["layers"] == []
    problem = next(f for f in found["findings"] if f["level"] == "problem" and f["check"] == "config")
    assert "OneBitAdam" in problem["text"] and problem["answer"]
    code, out, _ = run("doctor", str(file))
    assert code == 1 and "PROBLEM config: " in out and "optimizer.type: OneBitAdam" in " ".join(out.split())
