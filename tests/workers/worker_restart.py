"""A training script that is started again and again by its launcher, and resumes. Launched by test_faults.py under torchrun.

DIES: rank 1 kills itself in step 6 of its first life. WAITS: rank 1 says that it is there, and hangs in step 6 until it is ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from reference import oracle
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import engine_for, full
from workers.worker_faults import SETTINGS


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    folder = Path(sys.argv[-1])
    deepspeed.init_distributed(dist_backend=ranks.communication_backend(), timeout=timedelta(seconds=60), verbose=False)
    rank = dist.get_rank()
    cell = oracle.Cell("faults", 1, steps=8, width=32, config={"smartfrz": SETTINGS | {"total_steps": 8}})
    engine = engine_for(cell, cell.net())[0]
    engine.load_checkpoint(str(folder / "checkpoints"))
    start = engine.smartfrz.step
    for step in range(start, cell.steps):
        if rank == 1 and step == 5 and "WAITS" in os.environ:
            (folder / "waiting.1").touch()
            time.sleep(300)
        if rank == 1 and step == 5 and "DIES" in os.environ and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        engine.backward(oracle.loss_of(engine, *oracle.data(step, 0, rank), cell.dtype))
        engine.step()
        if (step + 1) % 2 == 0:
            engine.save_checkpoint(str(folder / "checkpoints"))
    weights = full(engine.module)
    if rank == 0:
        save_file({n: w.contiguous() for n, w in weights.items()}, folder / "final.safetensors")
        events = [e for e in engine.smartfrz.report().events if e.kind == "freeze"]
        (folder / "seen.json").write_text(json.dumps({"start": start, "frozen_at": {e.step: list(e.layers) for e in events}}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
