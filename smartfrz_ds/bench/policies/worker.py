"""The worker process of `smartfrz bench policies`: runs one training after the other on a real DeepSpeed engine.

`python -m smartfrz_ds.bench.policies.worker CACHE_DIR` reads one line per run from standard input, {"job": …, "file": …}, writes the result
to that file and answers with one line on standard output: {"error": null} or {"error": "…"}. It exits at the end of its input.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import platform
import socket
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger
from torch import nn

import smartfrz_ds
from smartfrz_ds.model.layers import find_layers

from .files import TaskFile
from .runs import Job
from .setups.data import Batch
from .setups.prepare import Objective, Training, prepare

Result = dict[str, Any]


def run(job: Job, cache_dir: Path) -> Result:
    """Train once and measure. Needs a process group (`alone`).

    Args:
        job: The run.
        cache_dir: Folder for pretrained networks.

    Returns:
        `metric`: accuracy on held-out data, in [0, 1]; `loss`: cross-entropy there, in nats. `flops`, `full_flops`: training FLOPs, forward
        and backward, actual and with nothing frozen; `saved`: the saved fraction. `seconds`, `cpu_seconds`: of the training, without set-up
        and evaluation; `total_seconds`: of everything. `layers`; `frozen`: [step, names]; `warnings`.

    Raises:
        ValueError: Settings that a run refuses; also any error of the engine.
    """
    began = time.perf_counter()
    task = job.settings
    training = prepare(task, job.seed, cache_dir)
    engine = start_engine(job, training, deepspeed_config(task, job.zero_stage))
    controller: smartfrz_ds.Controller = engine.smartfrz
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(task.steps):
        do_step(engine, next(training.batches), training.objective)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    report = controller.report()
    assert report.step == task.steps, (report.step, task.steps)
    full_flops, flops = controller.state_dict()["flops"]
    metric, loss = evaluate(engine, training)
    return {
        "metric": metric,
        "loss": loss,
        "flops": flops,
        "full_flops": full_flops,
        "saved": report.saved_flops_fraction,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "total_seconds": time.perf_counter() - began,
        "layers": list(report.layers),
        "frozen": [[event.step, list(event.layers)] for event in report.events if event.kind == "freeze"],
        "warnings": [event.message for event in report.events if event.kind == "warning"],
    }


def start_engine(job: Job, training: Training, config: dict[str, Any]) -> Any:
    """Create the engine of a run, in training mode. Collective."""
    engine: Any = smartfrz_ds.initialize(
        model=training.model,
        model_parameters=_groups(training.model),
        config=config,
        smartfrz=job.section,
        **({"probe_batch": training.probe} if job.section.get("probe") else {}),
    )[0]
    engine.train()
    return engine


def do_step(engine: Any, batch: Batch, objective: Objective) -> None:
    """Do one step of training with this rank's batch."""
    engine.backward(objective.loss(engine, _on(engine.device, batch)))
    engine.step()


def deepspeed_config(task: TaskFile, zero_stage: int) -> dict[str, Any]:
    """Make the DeepSpeed JSON of a task: fp32, torch's AdamW, gradient clipping at 1, DeepSpeed's own schedulers."""
    warmup = max(2, round(task.warmup * task.steps))  # DeepSpeed's schedulers raise anything less to 2
    schedulers: dict[str, dict[str, Any]] = {
        "linear": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": task.lr, "total_num_steps": task.steps}},
        "cosine": {"type": "WarmupCosineLR", "params": {"total_num_steps": task.steps}},
        "constant": {"type": "WarmupLR", "params": {"warmup_max_lr": task.lr}},
    }
    scheduler = schedulers[task.schedule]
    scheduler["params"] |= {"warmup_num_steps": warmup, "warmup_type": "linear"}
    return {
        "train_micro_batch_size_per_gpu": task.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": task.lr, "weight_decay": task.weight_decay, "torch_adam": True}},
        "scheduler": scheduler,
        "zero_optimization": {"stage": zero_stage},
    }


@contextlib.contextmanager
def alone() -> Any:
    """Provide a process group of this process alone, with one thread."""
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # The rendezvous is a file, so that no port can be taken. DeepSpeed requires the variables all the same (deepspeed/comm/comm.py).
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        deepspeed.init_distributed(init_method=f"file://{folder}/store", rank=0, world_size=1, verbose=False)
        try:
            yield
        finally:
            dist.destroy_process_group()
            # DeepSpeed's CPU communication op leaves 69 MB in shared memory (ops/csrc cpu/comm/shm.cpp) under the port's name.
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                left.unlink(missing_ok=True)


def _on(device: torch.device, batch: Batch) -> Batch:
    inputs, answers = batch
    return {name: x.to(device) for name, x in inputs.items()}, answers.to(device)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """One parameter group per layer, in every run: some policies set the learning rates of single layers."""
    groups = ([p for p in layer.params if p.requires_grad] for layer in find_layers(model))
    return [{"params": params} for params in groups if params]


@torch.no_grad()
def evaluate(engine: Any, training: Training) -> tuple[float, float]:
    """Accuracy and mean loss on held-out data."""
    engine.eval()
    scores = [training.objective.score(engine, _on(engine.device, batch)) for batch in training.held_out]
    right, loss, count = (sum(values) for values in zip(*scores, strict=True))
    return right / count, loss / count if math.isfinite(loss) else math.nan


def main() -> None:
    """Do the runs that standard input lists."""
    cache_dir = Path(sys.argv[1])
    # Only the answers go to standard output; all other output goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with alone():
        for line in sys.stdin:
            order = json.loads(line)
            error = None
            try:
                result = run(Job.from_json(order["job"]), cache_dir)
                write_result(Path(order["file"]), order["job"], result)
            except Exception:
                error = traceback.format_exc()
            gc.collect()  # an engine has many reference cycles
            answers.write(json.dumps({"error": error}) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("smartfrz_ds", "torch", "deepspeed", "transformers", "peft", "trl"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_result(file: Path, job: dict[str, Any], result: Result) -> None:
    """Write a result atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"job": job, "versions": versions(), "result": result}, indent=1))
    os.replace(partial, file)


if __name__ == "__main__":
    main()
