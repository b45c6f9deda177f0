"""What every worker does first and last: the job, the process group, the results. A worker is launched by `helpers.run_worker`."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger


def communication_backend() -> str:
    """The accelerator's, or gloo where ranks share a device, which NCCL refuses."""
    accelerator = get_accelerator()
    alone = accelerator.device_name() != "cpu" and accelerator.device_count() >= int(os.environ["WORLD_SIZE"])
    return str(accelerator.communication_backend_name()) if alone else "gloo"


def read_job() -> tuple[Any, Path]:
    """The job (whatever JSON the test wrote) and the folder for results."""
    logger.setLevel(logging.ERROR)
    return json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])


@contextmanager
def job() -> Iterator[tuple[Any, Path]]:
    """The job (whatever JSON the test wrote) and the folder for results, inside of the process group."""
    work, folder = read_job()
    if os.environ.get("SMARTFRZ_MEND_DEEPSPEED"):
        mend_deepspeed()
    deepspeed.init_distributed(dist_backend=communication_backend())
    yield work, folder
    dist.barrier()
    dist.destroy_process_group()


def mend_deepspeed() -> None:
    """Mend two faults that old releases have on CPUs with nothing frozen, so that the rest of them can be compared (tests/versions).

    Before 0.19.0 the flat weights of ZeRO-1/2 carry a graph, and torch 2.13 refuses to gather into them (the mend is that of 0.19.0).
    Before 0.19.8 ZeRO-3 waits for the last of several gathers only; gloo may complete the others later, and weights are then garbage.
    """
    flatten = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned

    def detached(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return flatten(self, *args, **kwargs).detach()

    def all_waited(self: Any, outputs: Any, inputs: Any, group: Any = None, async_op: bool = False) -> Any:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        handles = [gather(output, source, group=group, async_op=True) for output, source in zip(outputs, inputs, strict=True)]
        for handle in handles:
            handle.wait()
        return handles[-1]

    def waited(gather: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            handle = gather(*args, **kwargs)
            if handle is not None:
                handle.wait()
            return handle

        return run

    DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = detached
    TorchBackend.all_gather_coalesced = all_waited
    TorchBackend.all_gather_into_tensor = waited(TorchBackend.all_gather_into_tensor)
    TorchBackend.all_gather = waited(TorchBackend.all_gather)


@contextmanager
def case(name: str) -> Iterator[None]:
    """Puts the case's name into whatever goes wrong in it, and lets its engine go before the next one is made."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"case {name}") from error
    gc.collect()


def write(folder: Path, name: str, result: Any, *, rank: int | None = None) -> None:
    """This rank's result of a case: NAME.RANK.json."""
    (folder / f"{name}.{dist.get_rank() if rank is None else rank}.json").write_text(json.dumps(result))
