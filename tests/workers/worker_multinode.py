"""What ranks on two hosts train: cells of test_exact.py, cases of test_pipeline.py, and a net that is wide enough to fill a slow link.
Launched by test_multinode.py on two hosts, and on one."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from safetensors.torch import save_file
from workers import ranks, worker_exact, worker_pipeline


def sent() -> int:
    """Bytes that have left this host."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def slow_down(megabits: int) -> tuple[str, str]:
    """Limit what this host sends: how, and what the kernel said where it can't."""
    wide, narrow = f"netem rate {megabits}mbit delay 1ms", f"tbf rate {megabits}mbit burst 64kb latency 1s"
    for kind in (wide, narrow):
        done = subprocess.run(["tc", "qdisc", "replace", "dev", "eth0", "root", *kind.split()], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return kind, ""
    return "", done.stderr.strip()


def over_the_wire(cell: oracle.Cell, megabits: int) -> dict[str, Any]:
    """Seconds and bytes sent of each step over a slow link, with all layers, then with those of the plan frozen."""
    how, refused = slow_down(megabits)
    engine = worker_exact.engine_for(cell, cell.net())[0]
    seconds, sizes = [], []
    for step in range(cell.steps):
        if event := cell.at(step):
            getattr(engine.smartfrz, event[0])(event[1])
        x, y = oracle.data(step, 0, dist.get_rank())
        dist.barrier()
        began, before = time.perf_counter(), sent()
        engine.backward(oracle.loss_of(engine, x, y, cell.dtype))
        engine.step()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        sizes.append(sent() - before)
    engine.destroy()
    return {"seconds": seconds, "sent": sizes, "how": how, "refused": refused}


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        rank = dist.get_rank()
        where = {"host": socket.gethostname(), "local_rank": os.environ["LOCAL_RANK"], "world": dist.get_world_size()}
        ranks.write(folder, "where", where)
        for item in job.get("exact", []):
            cell = oracle.Cell(**item)
            with ranks.case(cell.name):
                tensors, facts = worker_exact.run(cell)
                save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{cell.name}.{rank}.safetensors")
                ranks.write(folder, cell.name, facts)
        if "wire" in job:
            with ranks.case("wire"):
                ranks.write(folder, "wire", over_the_wire(oracle.Cell(**job["wire"]), job["megabits"]))
        # last: DeepSpeed keeps a pipeline's grid as a global, and makes no other kind of engine after it
        for case in job.get("pipeline", []):
            with ranks.case(case["name"]):
                ranks.write(folder, case["name"], worker_pipeline.run(case, folder))


if __name__ == "__main__":
    main()
