"""The prefix cache when its memory or disk fails, or a rank is killed: the run goes on, or resumes, with the bits of a run without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS, environment, run_worker
from safetensors.torch import load_file

WORLD = 2


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of `size` bytes."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a full disk is a small tmpfs, and mounting one needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=1777", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a full disk is a small tmpfs, which can't be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.distributed(2)
def test_full_disk_lost_file_and_deleted_folder(tmp_path: Path) -> None:
    """Two ranks, rows on disk but for the first few. Mode "on": an error of the disk must not become one of the run."""
    memory = 4 * 64  # four rows
    with small_disk(tmp_path / "full", 8192) as full:
        cases: list[dict[str, Any]] = [
            {"name": "off", "kind": "deepspeed", "stage": 2, "cache": {"mode": "off"}},
            {"name": "ddp-off", "kind": "ddp", "cache": {"mode": "off"}},
            {"name": "full", "kind": "deepspeed", "stage": 2, "cache": {"path": str(full)}},
            {"name": "lost", "kind": "deepspeed", "stage": 2, "fault": {"what": "lost", "step": 9}},
            {"name": "ddp-lost", "kind": "ddp", "fault": {"what": "lost", "step": 9}},
            {"name": "z3-off", "kind": "deepspeed", "stage": 3, "cache": {"mode": "off"}},
            {"name": "z3-lost", "kind": "deepspeed", "stage": 3, "fault": {"what": "lost", "step": 9}},
            {"name": "fsdp2-off", "kind": "fsdp2", "cache": {"mode": "off"}},
            {"name": "fsdp2-lost", "kind": "fsdp2", "fault": {"what": "lost", "step": 9}},
            {"name": "folder", "kind": "deepspeed", "stage": 2, "fault": {"what": "folder", "step": 6}},
        ]
        for case in cases:
            common = {"mode": "on", "memory": memory, "disk": "1MiB", "path": str(tmp_path / case["name"])}
            case["cache"] = common | case.get("cache", {})
        (full / "other.bin").write_bytes(bytes(8192))
        run_worker("prefix_cache", cases, tmp_path, ranks=WORLD)
    for case in cases:
        for rank in range(WORLD):
            name = case["name"]
            weights = load_file(tmp_path / f"{name}.{rank}.safetensors")["weights"]
            plain = name.partition("-")[0] + "-off" if "-" in name else "off"
            off = load_file(tmp_path / f"{plain}.{rank}.safetensors")["weights"]
            assert torch.equal(weights, off), name
            facts = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            if "lost" in name:
                assert "off: " in facts["note"] and "its rows can't be read" in facts["note"], facts
                assert 0 < facts["hits"] < 16, facts  # of the time before
                assert rank or any("the run goes on without it" in x for x in facts["warnings"]), facts
            if name == "folder":
                assert "off" not in facts["note"] and facts["hits"] == 11, facts
            if name == "full":
                assert facts["rows"] == 4 and "which has no more room" in facts["note"], facts


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_rank_is_killed_in_each_phase_and_the_run_resumes_exactly(tmp_path: Path) -> None:
    """Rank 1 is killed while it has the index's lock, then in a write, then in a read. Each time torchrun ends the other rank, which must
    not hang, and starts both again; they resume without the rows. Weights equal those of a run that nobody disturbed, without a cache."""
    # Without the second, torch 2.13's torchrun gives a second start the store of the first one, with the addresses of dead ranks.
    for name, more in (("plain", {"PLAIN": "1"}), ("killed", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})):
        (tmp_path / name).mkdir()
        command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", "--max-restarts", "3"]
        done = subprocess.run(
            [*command, str(TESTS / "workers" / "worker_cache_restart.py"), str(tmp_path / name)],
            env=environment() | more,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    seen = json.loads((tmp_path / "killed" / "seen.json").read_text())
    assert all((tmp_path / "killed" / phase).exists() for phase in ("index", "write", "read"))
    assert seen["start"] >= 6 and seen["hits"] > 0, seen
    assert not list((tmp_path / "killed" / "rows").iterdir())  # nothing is left of all those lives
    one, other = (load_file(tmp_path / name / "final.safetensors") for name in ("plain", "killed"))
    assert all(torch.equal(one[n], other[n]) for n in one)
