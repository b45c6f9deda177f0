"""The wall time of a freezing run as a share of full training, measured on an engine with several ranks.

Both trainings exist at the same time on the same ranks and take turns step by step, so that everything else on the machine slows both.
Run by `measure_time` on each rank: `python -m smartfrz_ds.bench.policies.side_by_side NAME FILE SETTINGS`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smartfrz_ds.bench.launching import Settings, run_cases, worker_main

from .files import TaskFile
from .runs import Job

_MODULE = "smartfrz_ds.bench.policies.side_by_side"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine on which wall time is measured.

    Attributes:
        zero_stage: ZeRO stage, 0 to 3.
        ranks: Number of ranks, which share a task's batch.
    """

    zero_stage: int = 2
    ranks: int = 2

    def __post_init__(self) -> None:
        """Check the values."""
        if self.zero_stage not in range(4):
            raise ValueError(f"--engine: got ZeRO stage {self.zero_stage}; allowed: 0, 1, 2, 3")
        if self.ranks < 1:
            raise ValueError(f"--engine: got {self.ranks} ranks; allowed: an integer >= 1")

    @classmethod
    def parse(cls, text: str) -> Engine:
        """Read STAGE or STAGExRANKS.

        Raises:
            ValueError: The text has another form, or a number is out of range.
        """
        stage, _, ranks = text.removeprefix("zero").partition("x")
        try:
            return cls(zero_stage=int(stage), ranks=int(ranks or 2))
        except ValueError as error:
            if str(error).startswith("--engine"):
                raise
            raise ValueError(f"--engine: got {text!r}; allowed: a ZeRO stage and a number of ranks, like zero2x2") from None


def check_ranks(tasks: Mapping[str, TaskFile], engine: Engine) -> None:
    """Check that each task's batch can be shared by the engine's ranks.

    Raises:
        ValueError: One cannot; names the task.
    """
    for name, task in tasks.items():
        if task.batch % engine.ranks:
            raise ValueError(f"--engine: got {engine.ranks} ranks; allowed for task {name!r}: a divisor of its batch of {task.batch}")


def measure_time(job: Job, out: Path, engine: Engine) -> None:
    """Measure the time of a freezing run, unless a result with the same settings exists.

    Raises:
        RuntimeError: The ranks failed; has the end of their output.
    """
    task, name = job.name.split("/")
    run_cases(_MODULE, [name], out / "times" / task, _settings(job, out, engine), lambda _: engine.ranks, unit="timing")


def time_share(out: Path, job: Job, engine: Engine) -> float | None:
    """Return the measured wall time of a freezing run as a share of full training; None without a measurement."""
    task, name = job.name.split("/")
    try:
        data = json.loads((out / "times" / task / f"{name}.json").read_text())
        same = all(data["settings"][key] == value for key, value in _settings(job, out, engine).items() if key != "cache")
        return float(data["share"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings(job: Job, out: Path, engine: Engine) -> Settings:
    return {"job": job.to_json(), "zero_stage": engine.zero_stage, "cache": str((out / "cache").resolve())}


def measure(_: str, settings: Settings) -> Settings:
    """Train twice, with and without freezing, in turns, and sum up the steps' times. Collective.

    Returns:
        `share`: time of the freezing run as a share of full training, pauses and the policy's own work included; `seconds`,
        `full_seconds`: of all steps, of the slowest rank each; `saved`: saved FLOPs; `frozen`: [step, names]. A policy that looks at
        weights or gradients may freeze at other steps than in one process.
    """
    import torch
    import torch.distributed as dist

    from smartfrz_ds.distributed.devices import synchronize

    from .setups.prepare import prepare
    from .worker import deepspeed_config, do_step, start_engine

    torch.set_num_threads(1)
    job = replace(Job.from_json(settings["job"]), zero_stage=settings["zero_stage"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = deepspeed_config(job.settings, job.zero_stage) | {"train_micro_batch_size_per_gpu": job.settings.batch // ranks}
    full = replace(job, section={"policy": "manual", "total_steps": job.settings.steps})
    sides = []
    for each in (full, job):
        training = prepare(job.settings, job.seed, Path(settings["cache"]))
        sides.append((start_engine(each, training, config), training))
    sums = [0.0, 0.0]
    for number in range(job.settings.steps):
        for side in (0, 1) if number % 2 else (1, 0):
            engine, training = sides[side]
            inputs, answers = next(training.batches)
            mine = {name: x[rank::ranks] for name, x in inputs.items()}, answers[rank::ranks]
            dist.barrier()
            began = time.perf_counter()
            do_step(engine, mine, training.objective)
            synchronize(engine.device)
            taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=engine.device)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            sums[side] += float(taken)
    report: Any = sides[1][0].smartfrz.report()
    return {
        "settings": settings,
        "share": sums[1] / sums[0],
        "full_seconds": sums[0],
        "seconds": sums[1],
        "saved": report.saved_flops_fraction,
        "frozen": [[event.step, list(event.layers)] for event in report.events if event.kind == "freeze"],
    }


if __name__ == "__main__":
    worker_main(measure)
