"""Launches a benchmark's worker on ranks of this host: one case with its settings, whose rank 0 writes a JSON file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from smartfrz_ds.distributed.devices import accelerator_for

Settings = dict[str, Any]


def run_cases(
    module: str,
    cases: Iterable[str],
    out: Path,
    settings: Settings,
    ranks: Callable[[str], int],
    *,
    unit: str,
    environment: Mapping[str, str] | None = None,
) -> list[Settings]:
    """Run a worker with the deepspeed launcher for each case: `python -m MODULE CASE FILE SETTINGS`.

    A case that was already measured with the same settings is not run again. The ranks use this host's accelerators if there are enough of
    them, else its CPU; DS_ACCELERATOR decides otherwise.

    Args:
        module: The worker's module.
        cases: Names of the cases.
        out: Folder of the results, one JSON file per case.
        settings: JSON-serializable settings, passed to every case.
        ranks: Returns the number of ranks for a case.
        unit: Name of a case in the progress bar.
        environment: Additional environment variables.

    Returns:
        The content of the JSON files.

    Raises:
        RuntimeError: A run failed; the message has the end of its output.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in tqdm(list(cases), desc=f"{unit}s", unit=unit):
        file = out / f"{name}.json"
        accelerator = (environment or {}).get("DS_ACCELERATOR") or accelerator_for(ranks(name))
        case_settings = settings if accelerator == "cpu" else settings | {"accelerator": accelerator}
        if not _measured(file, case_settings):
            _launch(module, name, file, case_settings, ranks(name), environment or {})
        results.append(json.loads(file.read_text()))
    return results


def worker_main(measure: Callable[[str, Settings], Settings]) -> None:
    """Measure this worker's case on every rank; rank 0 writes the result atomically.

    Args:
        measure: Receives the case and the settings and returns a JSON-serializable result.
    """
    import deepspeed  # here: the launching process does not need it
    import torch.distributed as dist
    from deepspeed.utils import logger

    name, file, settings = sys.argv[-3], Path(sys.argv[-2]), json.loads(sys.argv[-1])
    logger.setLevel(logging.ERROR)
    deepspeed.init_distributed()  # over the backend of DeepSpeed's accelerator
    result = measure(name, settings)
    if dist.get_rank() == 0:
        new = file.with_suffix(".new")
        new.write_text(json.dumps(result, indent=1))
        new.replace(file)
    dist.barrier()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _measured(file: Path, settings: Settings) -> bool:
    try:
        return bool(json.loads(file.read_text())["settings"] == settings)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _launch(module: str, name: str, file: Path, settings: Settings, ranks: int, environment: Mapping[str, str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(port)]
    command += ["--module", module, name, str(file), json.dumps(settings)]
    every = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": accelerator_for(ranks)} | dict(environment)
    run = subprocess.run(command, env=every, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    # DeepSpeed's CPU communication op leaves 69 MB per rank in shared memory (ops/csrc cpu/comm/shm.cpp) under the port's name.
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)
    if run.returncode or not file.exists():
        raise RuntimeError(f"{name}: the run ended with exit code {run.returncode}\n{run.stdout[-4000:]}")
