"""What the plugin does in a step is counted: calls of its Python functions, values that it reads from tensors, collectives of its own.

Background: with 4,800 parameters a plain step took 45,887 calls, because the question whether a policy has something to freeze counted
the elements of all parameters, three times in each step. On a GPU each value that is read from a tensor waits for the whole queue.
The numbers are those of docs/cost-of-a-freeze.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker
from typer.testing import CliRunner

from smartfrz_ds.cli.main import app

FEW, MANY = 52, 116  # parameters; more of them, and more layers, must not cost more in a plain step
ENGINES = ["z2", "z3", "fsdp2", "pipeline"]
# Most calls in a plain step with nothing frozen.
CALLS = {"z2": 66, "z3": 68, "fsdp2": 61, "pipeline": 144}  # the schedule is ours in a pipeline: here of two micro-batches


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("overhead", [[engine, params] for engine in ENGINES for params in (FEW, MANY)], tmp_path_factory.mktemp("overhead"))


def counts(seen: Path, engine: str, params: int, rank: int) -> dict[str, Any]:
    return json.loads((seen / f"{engine}-{params}.{rank}.json").read_text())


@pytest.mark.distributed(2)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_step_costs_the_same_for_any_number_of_parameters(seen: Path, engine: str) -> None:
    for rank in (0, 1):
        few, many = counts(seen, engine, FEW, rank)["plain step"], counts(seen, engine, MANY, rank)["plain step"]
        assert (few["reads"], few["collectives"]) == (many["reads"], many["collectives"]) == (0, 0), (few, many)
        assert few["calls"] == many["calls"] <= CALLS[engine], (few, many)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_step_with_frozen_layers_costs_the_same_too(seen: Path, engine: str) -> None:
    for rank in (0, 1):
        few, many = (counts(seen, engine, params, rank)["plain step, half frozen"] for params in (FEW, MANY))
        assert (few["reads"], few["collectives"]) == (many["reads"], many["collectives"]) == (0, 0), (few, many)
        # ZeRO-3's hook for the gradient of a parameter is replaced by one of ours (names.py), once for each active parameter. A pipeline's
        # train_batch calls model.train(), which ends at each frozen layer (freeze_modules.py) instead of visiting its modules.
        engines_own = ("names.py:counted_once", "freeze_modules.py:__call__")
        calls = [one["calls"] - sum(one["places"].get(place, 0) for place in engines_own) for one in (few, many)]
        assert calls[0] == calls[1] <= CALLS[engine] + 40, (few, many)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_status_line_and_a_snapshot_exchange_once(seen: Path, engine: str) -> None:
    for params in (FEW, MANY):
        told = counts(seen, engine, params, 0)
        status, snapshot = told["status line"], told["snapshot"]
        # the losses of the steps in between, and the sums of all ranks
        assert status["reads"] <= 2 and status["collectives"] == 1, status
        assert snapshot["reads"] == 1 and snapshot["collectives"] <= 1, snapshot


@pytest.mark.slow  # the launcher starts six times
@pytest.mark.distributed(2)
def test_the_command_prints_seconds_and_counts(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["bench", "overhead", "--params", "52", "--steps", "40", "--few", "52", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "| attach_torch | 52 | **" in run.stdout and "| FSDP2 | 52 | " in run.stdout
    assert json.loads((tmp_path / "z3-counts.json").read_text())["counts"]["plain step"]["reads"] == 0


@pytest.mark.parametrize("arguments", [["--params", "17"], ["--params", "a"], ["--steps", "39"], ["--few", "33"]])
def test_numbers_that_are_too_small_are_refused(arguments: list[str], tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["bench", "overhead", *arguments, "--out", str(tmp_path)])
    assert run.exit_code == 2 and "allowed" in run.output
