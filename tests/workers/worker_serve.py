"""Two ranks that wait for cells and run them one after the other, so that a property test need not launch for each example.

The folder is the mail box: job-N.json in, N.RANK.safetensors and N.RANK.json out (or N.RANK.error), "stop" ends it. An error in a cell
leaves the ranks in an unknown state, so it ends the server too.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
import traceback
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.utils import logger
from reference import oracle
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import run


def main() -> None:
    logger.setLevel(logging.ERROR)
    folder = Path(sys.argv[-1])
    deepspeed.init_distributed(dist_backend=ranks.communication_backend())
    rank, number, deadline = dist.get_rank(), 0, time.monotonic() + 900
    while not (folder / "stop").exists() and time.monotonic() < deadline:
        job = folder / f"job-{number}.json"
        if not job.exists():
            time.sleep(0.02)
            continue
        try:
            tensors, facts = run(oracle.Cell(**json.loads(job.read_text())))
        except Exception:
            (folder / f"{number}.{rank}.error").write_text(traceback.format_exc())
            raise
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{number}.{rank}.safetensors")
        (folder / f"{number}.{rank}.part").write_text(json.dumps(facts))
        (folder / f"{number}.{rank}.part").rename(folder / f"{number}.{rank}.json")
        number += 1
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
