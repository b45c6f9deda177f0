"""A rank is killed at a random moment, in the middle of a freeze or of a save too; what is resumed ends as if nothing had happened.

Every run freezes twice and saves every second step. One rank is killed at a seeded place (worker_chaos.py says which there are), the run
is started again, and its final weights equal those of a single process that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RanksFailed, run_worker
from reference.oracle import Cell, Net, reference
from safetensors.torch import load_file

PLAN = {"3": ["freeze", ["embeddings", "blocks.0"]], "6": ["freeze", ["blocks.1", "blocks.2"]]}
CELLS = {stage: Cell(f"z{stage}", stage, steps=9, plan=PLAN) for stage in (1, 2, 3)}

pytestmark = pytest.mark.distributed(2)


def chaos_run(folder: Path, stage: int, kill: dict[str, Any] | None, tag: str | None = None) -> dict[str, Any]:
    """One launch. Raises RanksFailed where a rank died."""
    cell = dataclasses.asdict(CELLS[stage])
    run_worker("chaos", {"cell": cell, "kill": kill, "save_every": 2, "tag": tag}, folder, timeout=200)
    return json.loads((folder / "seen.json").read_text())


def check_end(folder: Path, stage: int, seen: dict[str, Any]) -> None:
    final = load_file(folder / "final.safetensors")
    expected = reference(CELLS[stage]).weights[-1]
    weights = torch.cat([final[n].view(-1) for n, _ in Net().named_parameters()])
    assert torch.equal(weights, expected)
    assert seen["frozen"] == ["embeddings", "blocks.0", "blocks.1", "blocks.2"]


def killed(folder: Path, stage: int, kill: dict[str, Any], tag: str | None = None) -> dict[str, Any] | None:
    """A run that is to be killed; what it saw if it ended before it got to that place, None if the rank died there."""
    try:
        return chaos_run(folder, stage, kill, tag)
    except RanksFailed as failed:
        assert f"exit code -{signal.SIGKILL.value}\n" in str(failed), "the rank died of something else than the kill"
        return None


def test_a_run_that_is_killed_twice_resumes_exactly(tmp_path: Path) -> None:
    """Inside the second freeze (before step 6; resumed from step 6), and inside the save after step 8 of the resumed run."""
    assert killed(tmp_path, 3, {"rank": 1, "at": "after one group's state", "count": 2}) is None
    assert killed(tmp_path, 3, {"rank": 0, "at": "half of optimizer states", "count": 1}) is None
    seen = chaos_run(tmp_path, 3, None)
    assert seen["start"] == 6
    check_end(tmp_path, 3, seen)


# Some places are passed by rank 0 only (it writes the freeze state, the list of files, `latest`, and in stages 1 and 2 the model).
ONLY_RANK_0 = ("smartfrz", "latest", "list of files", "half of model states")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_many_kill_points(tmp_path: Path, stage: int) -> None:
    """8 kills a stage, 24 in all, at seeded draws of (place, how often passed, rank). A resumed run may be killed again; one that ends
    before it gets to its place is compared, and the next begins from nothing."""
    places = chaos_run(tmp_path / "straight", stage, None)["places"]
    everything = [(place, count) for place, most in sorted(places.items()) for count in range(1, most + 1)]
    draw, kills, number = random.Random(stage), 0, 0
    while kills < 8:
        (place, count), rank = draw.choice(everything), draw.randrange(2)
        kill = {"rank": 0 if any(word in place for word in ONLY_RANK_0) else rank, "at": place, "count": count}
        seen = killed(tmp_path / str(number), stage, kill)
        if seen is None:
            kills += 1
        else:
            check_end(tmp_path / str(number), stage, seen)
            number += 1
    check_end(tmp_path / str(number), stage, chaos_run(tmp_path / str(number), stage, None))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", ["before writing smartfrz.safetensors", "half of optimizer states", "before the list of files"])
def test_one_tag_that_is_written_again_and_again(tmp_path: Path, place: str) -> None:
    """A user who overwrites the same tag loses it to a crash in the middle of a save: that is said, and nothing torn is loaded."""
    assert killed(tmp_path, 2, {"rank": 0, "at": place, "count": 2}, "always") is None
    with pytest.raises(RanksFailed) as failed:
        chaos_run(tmp_path, 2, None, "always")
    assert "nothing to resume from" in str(failed.value) and "incomplete" in str(failed.value)
