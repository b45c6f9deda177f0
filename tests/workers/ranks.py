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
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
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
    deepspeed.init_distributed(dist_backend=communication_backend())
    yield work, folder
    dist.barrier()
    dist.destroy_process_group()


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
