"""A start of two ranks where a killed build left its lock. What is removed and what isn't: tests/unit/test_build_locks.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment, free_port

from smartfrz_ds.integrations import build_locks

SCRIPT = """
import json, os, pathlib, sys
import deepspeed, torch, torch.distributed as dist
import smartfrz_ds

folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"])
try:  # a later lock is that of the other rank, which may load the op already
    first = (folder / "deepspeed_shm_comm" / "lock").stat().st_mtime_ns == int(os.environ["STALE_SINCE"])
except FileNotFoundError:
    first = False
deepspeed.init_distributed()  # loads the communication op
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
          "smartfrz": {"policy": "manual"}}
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
if dist.get_rank() == 0:
    (folder / "other").mkdir()
    (folder / "other" / "lock").touch()
dist.barrier()
engine = smartfrz_ds.initialize(model=model, config=config)[0]
dist.barrier()
loss = engine(torch.ones(1, 4)).sum()
engine.backward(loss)
engine.step()
saw = [first, (folder / "other" / "lock").exists(), engine.smartfrz.step]
pathlib.Path(f"{sys.argv[-1]}.{dist.get_rank()}").write_text(json.dumps(saw))
"""


@pytest.mark.distributed(2)
def test_a_start_with_a_stale_lock(tmp_path: Path) -> None:
    """Two ranks, as --module starts them: without the removal both wait for the lock, indefinitely, in deepspeed.init_distributed."""
    folder = tmp_path / "extensions"
    built = build_locks.extensions_folder()
    ops = [p.parent for p in built.glob("**/deepspeed_shm_comm/*.so")]
    if ops:  # else it is built, in a minute
        shutil.copytree(ops[0], folder / "deepspeed_shm_comm")
    (folder / "deepspeed_shm_comm").mkdir(parents=True, exist_ok=True)
    (folder / "deepspeed_shm_comm" / "lock").unlink(missing_ok=True)  # of somebody who builds now
    (folder / "deepspeed_shm_comm" / "lock").touch()
    since = (folder / "deepspeed_shm_comm" / "lock").stat().st_mtime_ns
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    port = free_port()
    own = {
        "TORCH_EXTENSIONS_DIR": str(folder),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "STALE_SINCE": str(since),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "smartfrz_ds", str(script), str(tmp_path / "saw")],
            env=environment() | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output = "".join(process.communicate(timeout=240)[0] for process in ranks)
    finally:
        for process in ranks:
            process.kill()
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink(missing_ok=True)
    for rank in range(2):
        assert json.loads((tmp_path / f"saw.{rank}").read_text()) == [False, False, 1], output
    assert output.count("removed the lock of a killed build") == 2, output
