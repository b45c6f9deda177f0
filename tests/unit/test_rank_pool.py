"""Ranks that are processes of their own from the start, as on a GPU, whose driver does not survive a fork."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_pool

SCRIPT = """
import json, os, sys, pathlib
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
pathlib.Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps([os.environ[n] for n in names]))
print("from rank", os.environ["RANK"])
if sys.argv[3] == "fails":
    raise SystemExit(int(os.environ["RANK"]) * 7)
"""


@pytest.mark.parametrize(("how", "code"), [("works", 0), ("fails", 7)])
def test_ranks_without_a_fork(how: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")  # read by the new processes
    monkeypatch.setattr(rank_pool, "FORKS", False)
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text(SCRIPT)
    output.write_text("")
    job = {"script": str(script), "arguments": [str(tmp_path), how], "ranks": 2, "port": 1234, "timeout": 100, "output": str(output)}
    assert rank_pool.run_job(job) == code
    # they share a device where there are fewer
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [f[0] for f in found] == ["0", "1"] and found[0] == ["0", "0", "2", "1234"]
    assert sorted(output.read_text().split("\n")) == ["", "from rank 0", "from rank 1"]
