"""Trains on ZeRO-1 with the prefix cache, and is started again and again by its launcher. Launched by test_cache_faults.py under torchrun.

In each of its first lives rank 1 kills itself in another phase of the cache; the last life ends the run. PLAIN: no cache, nobody is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from reference import cached_runs, oracle
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import full
from workers.worker_prefix_cache import EPOCHS, data, engine_for

PHASES = {"index": (np, "void"), "write": (os, "pwritev"), "read": (os, "preadv")}
DIES_AT = {"index": 1, "write": 3, "read": 7}
SAVES_EVERY = 2


def kill_in(phase: str) -> None:
    """Kill this process at its next call of a function of the phase: with the index's lock held, in mid-write, in mid-read."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(*PHASES[phase], die)


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    folder, plain = Path(sys.argv[-1]), "PLAIN" in os.environ
    deepspeed.init_distributed(dist_backend=ranks.communication_backend(), timeout=timedelta(seconds=60), verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    cache = {"mode": "off"} if plain else {"mode": "on", "memory": "16MiB", "path": str(folder / "rows")}
    torch.manual_seed(0)
    engine = engine_for({"stage": 1, "cache": cache}, oracle.Net())
    controller = engine.smartfrz
    engine.load_checkpoint(str(folder / "checkpoints"))
    start = controller.step
    if not controller.frozen:
        controller.freeze(controller.layers[:4])
    phase = next((p for p in DIES_AT if not (folder / p).exists()), "") if not plain and rank == 1 else ""
    engine.train()
    for step, batch in enumerate(cached_runs.batches(data(), epochs=EPOCHS, batch=oracle.BATCH, rank=rank, world=world)):
        if step < start:
            continue
        if phase and step >= DIES_AT[phase]:
            (folder / phase).touch()
            kill_in(phase)
        engine.backward(oracle.loss_of(engine, batch["x"], batch["y"], "fp32"))
        engine.step()
        if (step + 1) % SAVES_EVERY == 0:
            engine.save_checkpoint(str(folder / "checkpoints"))
    weights = full(engine.module)
    if rank == 0:
        save_file({n: w.contiguous() for n, w in weights.items()}, folder / "final.safetensors")
        facts = {"start": start, "hits": cached_runs.hits_of(controller), "note": controller.report().cache_note}
        (folder / "seen.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
