"""Branches beside matched runs: what a collection holds, and the tables against known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smartfrz_ds.predictor.recording.costs import STEPS, collect_costs, cost_runs
from smartfrz_ds.predictor.training.cost_eval import cost_rows, cost_table


def test_a_collection_has_branches_and_matched_runs_and_is_kept(tmp_path: Path) -> None:
    run = cost_runs()[0]
    held = collect_costs(run, tmp_path)
    assert len(held["branches"]) == 9 and len(held["matched"]) == 3 and len(held["full"]) == 2
    assert len(held["losses"]) == len(held["lr"]) == STEPS / 8 and held["losses"][-1] < held["losses"][0]
    assert all(0 <= branch["p"] <= 1 or branch["p"] == -1 for branch in held["branches"])
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content == held
    file.write_text(json.dumps(content | {"cpu_seconds": -1.0}))
    assert collect_costs(run, tmp_path)["cpu_seconds"] == -1.0, "kept"
    rows = cost_rows([held])
    assert len(rows) == 9 and rows[0]["kind"] == run.net and rows[0]["left"] > rows[-1]["left"] >= 0


def test_every_setting_is_there_before_one_comes_twice() -> None:
    runs = cost_runs()
    assert len({run.name for run in runs}) == len(runs) == 96
    assert len({(run.net, run.data) for run in runs[:12]}) == 12


def test_the_tables_against_known_answers() -> None:
    def row(kind: str, i: int) -> dict[str, Any]:  # the curve tells the cost, the probability nothing
        return {
            "kind": kind,
            "cost": 0.01 * i,
            "matched": 0.046,
            "p": 0.5,
            "share": 1.0,
            "left": 0.5,
            "curve": 0.02 * i + 0.01,
            "shorter": 0.05,
        }

    table = cost_table([row(kind, i) for kind in ("a", "b") for i in range(10)])
    (curve,) = (line for line in table.splitlines() if line.startswith("| loss curve: remaining"))
    assert curve.split("|")[2:4] == [" 1.000 ", " 1.000 "] and float(curve.split("|")[4]) == pytest.approx(1.0, abs=0.02)
    assert "in 50% of 20 branches" in table and "AUC of 1.000" in table
    means = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| a") or "choose" in line
    }
    assert means["always freeze"] == "+0.045" and means["choose with hindsight"] == "+0.033"
    assert means["choose by both predicted costs, kinds left out"] == "+0.033"
