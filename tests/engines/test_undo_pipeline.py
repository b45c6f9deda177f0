"""A change of a pipeline that fails anywhere, on either stage, is undone on all of them: a move of layers above all, and a freeze or a thaw
of weights that two stages share. See worker_undo_pipeline.py.

Each change is tried one step before it is carried out, with an error at one point after another, or at each n-th (stride), of one stage
after the other; after each error the pictures before and after are compared, and after each step the weights with those of a run that never
tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker
from test_pipeline import saw

FRONT = ["embeddings", "layers.1", "layers.2"]
# 11 entries, of which the first stage begins with six. There go frozen and active ones; then frozen ones, with and without kept state, and
# active ones that were there before; what has moved thaws.
MOVES: dict[str, Any] = {
    "plan": {"1": ["freeze", FRONT], "3": ["rebalance", [0, 8, 11]], "5": ["rebalance", [0, 2, 11]], "7": ["thaw", FRONT[1:]]},
    "tried": [1, 3, 5, 7],
    "steps": 9,
    "micro": 2,
    "pp": 2,
    "smartfrz": {"keep_state": 100},
}
# 9 entries, the first and the last tied, so that both stay; the first stage begins with five
TIED: dict[str, Any] = {
    "plan": {"2": ["freeze", ["embeddings", "layers.1"]], "4": ["rebalance", [0, 3, 9]], "6": ["thaw", ["embeddings", "layers.1"]]},
    "tried": [2, 4, 6],
    "steps": 8,
    "micro": 2,
    "pp": 2,
    "tied": "train",
}
CASES = {"z0": MOVES | {"stride": 13}}
LATER = {
    "z0-all": MOVES,
    "tied-z0": TIED,
    "z0-lines": MOVES | {"lines": True},
    "tied-z0-lines": TIED | {"lines": True},
    "z1": MOVES | {"stage": 1},
    "bf16-z1": MOVES | {"stage": 1, "dtype": "bf16"},
    "bf16-z0": MOVES | {"dtype": "bf16"},
    "tied-z1": TIED | {"stage": 1},
    "tied-kept-z0": TIED | {"smartfrz": {"keep_state": 100}},
    "tied-freeze-z0": TIED | {"tied": "freeze"},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = [{"name": name} | case for name, case in CASES.items()]
    return run_worker("undo_pipeline", job, tmp_path_factory.mktemp("undo"), timeout=300)


def check(folder: Path, name: str, case: dict[str, Any]) -> None:
    for rank in (0, 1):
        found = saw(folder, name, rank)
        assert found["wrong"] == []
        assert found["different"] == [], "weights differ from those of a run that never tried"
        assert found["moved"]
        assert len(found["points"]) == len(case["tried"])
        for change, points in found["points"].items():
            assert len(points) >= (30 if "rebalance" in change else 12), (change, points)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", CASES)
def test_an_error_at_any_point_of_a_stage_is_undone_on_all_of_them(launched: Path, name: str) -> None:
    check(launched, name, CASES[name])


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", LATER)
def test_an_error_is_undone_in_more_settings(tmp_path: Path, name: str) -> None:
    run_worker("undo_pipeline", [{"name": name} | LATER[name]], tmp_path, timeout=300)
    check(tmp_path, name, LATER[name])
