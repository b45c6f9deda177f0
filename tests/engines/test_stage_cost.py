"""Collectives and copies to the host of a freezing stage, a snapshot and a watched step: DDP on two ranks.

Background: a stage that froze something took 20 collectives and 31 reads of tensors by the host, among them one read for each rank in each
agreement and 9 collectives that measured a network over which nothing moved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from helpers import run_worker

pytestmark = pytest.mark.distributed(2)
CASES = ["stages", "snapshots", "guarded", "agreements", "probe at start", "probe at stage"]
Saw = Callable[..., Any]


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Saw:
    """All cases in one launch of two ranks."""
    folder = run_worker("stage", CASES, tmp_path_factory.mktemp("stage"), timeout=200)
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


def test_an_agreement_is_one_collective_and_one_copy(saw: Saw) -> None:
    for rank in (0, 1):
        seen = saw("agreements", rank)
        assert {name: row["collectives"] for name, row in seen.items()} == {name: 2 if name.startswith("large") else 1 for name in seen}
        assert all(row["reads"] == row["collectives"] for row in seen.values()), seen
        assert seen["small objects"]["result"] == [[0] * 10, [1] * 10]
        assert seen["large objects"]["result"] == [[0, "x" * 5000], [1, "x" * 10000]]
        assert (seen["small bytes"]["result"], seen["large bytes"]["result"], seen["no bytes"]["result"]) == ("abc", "abc" * 2000, "")
        assert seen["results"]["result"] == ["kept", [[1, 7], [2, 7]]]
        assert (seen["mean of one"]["result"], seen["mean"]["result"], seen["mean of none"]["result"]) == (3.0, 2.5, None)
        assert seen["mean of nan"]["result"] is True


def test_a_stage_takes_the_agreements_that_it_needs(saw: Saw) -> None:
    """Without a freeze: the decision, and that all ranks have the same. With one also: that it can be cut, the plans with their memory,
    the end of the transaction, the bytes released, the callbacks; in the first also the kind of schedule and the speed of memory."""
    for rank in (0, 1):
        rows = saw("stages", rank)["rows"]
        stages = {step: rows[step - 1] for step in (4, 8, 12)}
        assert all(row["collectives"] == row["reads"] == 0 for step, row in enumerate(rows, 1) if step not in stages)
        assert stages[4]["froze"] == 1 and stages[8]["froze"] == stages[12]["froze"] == 0
        assert stages[8]["collectives"] == stages[12]["collectives"] == 2
        assert stages[4]["collectives"] <= 9 and "all_to_all_single" not in stages[4]["kinds"], stages[4]
        if rank == 1:  # rank 0 also runs the policy
            assert stages[8]["reads"] == 2 and stages[4]["reads"] == stages[4]["collectives"], stages


def test_a_snapshot_without_shards_takes_no_collective(saw: Saw) -> None:
    for rank in (0, 1):
        rows = saw("snapshots", rank)["rows"]
        assert all(row["collectives"] == 0 for row in rows)
        assert all(row["reads"] == (1 if rank == 0 else 0) for row in rows[3::2]), "one copy, on the rank that keeps the history"


def test_a_watched_step_takes_one_collective_and_one_copy(saw: Saw) -> None:
    for rank in (0, 1):
        rows = saw("guarded", rank)["rows"]
        assert rows[3]["froze"] == 1
        assert [(row["collectives"], row["reads"]) for row in rows[4:7]] == [(1, 1)] * 3, "the window"
        assert all((row["collectives"], row["reads"]) == (0, 0) for row in (*rows[:3], *rows[8:11])), "outside of it"


@pytest.mark.parametrize(("name", "step", "kind"), [("probe at start", -1, "ValueError"), ("probe at stage", 3, "RuntimeError")])
def test_an_error_in_the_probe_of_one_rank_ends_all(saw: Saw, name: str, step: int, kind: str) -> None:
    """Background: the other ranks waited for the failed one in the next collective, until its timeout."""
    own, other = saw(name, 1), saw(name, 0)
    assert own["step"] == other["step"] == step, (own, other)
    assert own["error"].startswith(kind) and other["error"].startswith(kind), (own, other)
    assert "rank 1 could not go on" in other["error"] and "rank 1" not in own["error"]
