"""Whole trainings of `smartfrz bench cache --trainings`: full, frozen by the predictor, the same with the prefix cache, and matched.

The matched training is full training whose schedule is shortened to the wall time of the training with the cache. All run on two ranks with
ZeRO-2, one after the other; each is one launch of this module: `python -m smartfrz_ds.bench.cache.trainings NAME FILE SETTINGS`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from smartfrz_ds.bench.launching import Settings, run_cases, worker_main
from smartfrz_ds.bench.policies.files import TaskFile
from smartfrz_ds.bench.policies.runs import Job, matched_steps

RANKS = 2
KINDS = ("full", "frozen", "cached", "matched")
EPOCHS = 6
_COMMON = {"batch": 16, "lr": 2e-4, "schedule": "linear"}
TASKS: dict[str, dict[str, Any]] = {
    "minilm": {**_COMMON, "net": "minilm", "data": "bbc", "length": 64, "train_rows": 240, "held_out": 256},
    "gpt": {
        **_COMMON,
        "net": "gpt",
        "data": "bbc-chars",
        "width": 192,
        "depth": 6,
        "length": 64,
        "lr": 1e-3,
        "pretrain_steps": 600,
        "held_out": 256,
    },
}
_GPT_ROWS = 960  # windows of the text that are trained on, in each epoch again


def bench_trainings(out: Path, *, tasks: Sequence[str] = tuple(TASKS), seeds: int = 2, steps: int = 0) -> str:
    """Run the trainings and make the table, which is also written to `out`/trainings.md.

    Args:
        out: Folder with one JSON file per training. A training that was already done with the same settings is not done again.
        tasks: Keys of `TASKS`.
        seeds: Number of seeds, at least 1. Odd seeds run in another order, since the machine may change with time.
        steps: Length of full training in steps; 0: six epochs.

    Returns:
        The table as Markdown.

    Raises:
        ValueError: An unknown task or a number out of range.
        RuntimeError: A training failed; the message has the end of its output. Earlier results are kept.
    """
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"--net: got {unknown[0]!r}; allowed with --trainings: {', '.join(TASKS)}")
    for option, value, least in (("--seeds", seeds, 1), ("--steps", steps, 0)):
        if value < least:
            raise ValueError(f"{option}: got {value}; allowed: at least {least}")
    results: list[dict[str, Any]] = []
    for seed in range(seeds):
        for name in tasks:
            length = steps or EPOCHS * (_rows_of(name) // TASKS[name]["batch"])
            order = KINDS[:3] if seed % 2 == 0 else KINDS[2::-1]
            done = {kind: _train(out, name, kind, seed, length) for kind in order}
            share = done["cached"]["seconds"] / done["full"]["seconds"]
            done["matched"] = _train(out, name, "matched", seed, matched_steps(length, share))
            results += [done[kind] for kind in KINDS]
    text = table(results)
    (out / "trainings.md").write_text(text)
    return text


def _rows_of(name: str) -> int:
    return TASKS[name].get("train_rows", _GPT_ROWS)


def _train(out: Path, name: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    settings: Settings = {"task": {**TASKS[name], "steps": steps}, "pretrained": str((out / "pretrained").resolve())}
    (result,) = run_cases("smartfrz_ds.bench.cache.trainings", [f"{name}-{kind}-{seed}"], out, settings, lambda _: RANKS, unit="training")
    return result


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Train once. Collective.

    Returns:
        "seconds": of the training loop, of the slowest rank; "metric", "loss": on held-out data; "saved": the share of the training FLOPs;
        "frozen": [step, names]; "note": what the cache says of itself.
    """
    import torch
    import torch.distributed as dist

    from smartfrz_ds.bench.policies.setups.data import batches_of, bbc_codes
    from smartfrz_ds.bench.policies.setups.prepare import prepare
    from smartfrz_ds.bench.policies.worker import deepspeed_config, do_step, evaluate, start_engine
    from smartfrz_ds.distributed.devices import synchronize

    torch.set_num_threads(1)
    kind, seed = name.split("-")[1], int(name.split("-")[2])
    task = TaskFile.model_validate(settings["task"])
    section: dict[str, Any] = {"policy": "attention" if kind in ("frozen", "cached") else "manual", "total_steps": task.steps}
    section["cache"] = {"mode": "auto" if kind == "cached" else "off"}
    job = Job(task=name, settings=task, section=section, seed=seed, zero_stage=2, predictor="")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank:  # rank 0 makes what is pretrained
        dist.barrier()
    training = prepare(task, seed, Path(settings["pretrained"]))
    if not rank:
        dist.barrier()
    if task.data == "bbc-chars":  # windows at fixed places, so that each comes again in every epoch
        rows = bbc_codes()[: _GPT_ROWS * (task.length + 1)].view(_GPT_ROWS, task.length + 1)
        training = replace(training, batches=batches_of(({"x": rows[:, :-1]}, rows[:, 1:]), task.batch, seed))
    config = deepspeed_config(task, job.zero_stage) | {"train_micro_batch_size_per_gpu": task.batch // ranks}
    engine = start_engine(job, training, config)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(task.steps):
        inputs, answers = next(training.batches)
        do_step(engine, ({key: x[rank::ranks] for key, x in inputs.items()}, answers[rank::ranks]), training.objective)
    synchronize(engine.device)
    seconds: list[Any] = [None] * ranks
    dist.all_gather_object(seconds, time.perf_counter() - began)
    report = engine.smartfrz.report()
    metric, loss = evaluate(engine, training)
    return {
        "settings": settings,
        "name": name,
        "steps": task.steps,
        "seconds": max(seconds),
        "metric": metric,
        "loss": loss,
        "saved": report.saved_flops_fraction,
        "frozen": [[event.step, list(event.layers)] for event in report.events if event.kind == "freeze"],
        "note": report.cache_note if kind == "cached" else "",
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Make the table of these results, as Markdown."""
    lines = [
        "Two ranks, ZeRO-2. Full: nothing frozen. Frozen: policy `attention` with its defaults. Cached: the same, `cache.mode` `auto`.",
        "Matched: full training whose schedule is shortened to the wall time of the cached one. In brackets: compared with full training.",
        "",
        "| task | training | steps | seconds | ÷ full | saved FLOPs | correct | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    named: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        task, kind, _ = result["name"].split("-")
        named.setdefault((task, kind), []).append(result)
    for (task, kind), runs in named.items():
        full = named[task, "full"]
        ratio = fmean(run["seconds"] / whole["seconds"] for run, whole in zip(runs, full, strict=True))
        change = fmean(run["metric"] for run in runs) - fmean(run["metric"] for run in full)
        correct = f"{_each(runs, 'metric', '.2%')} ({100 * change:+.2f})"
        cells = [task, kind, _each(runs, "steps", ".0f"), _each(runs, "seconds", ".1f"), f"{ratio:.2f}"]
        cells += [f"{fmean(run['saved'] for run in runs):.0%}", correct, _each(runs, "loss", ".4f")]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {run['name']}: {run['note']}" for run in results if run["note"]]
    return "\n".join([*lines, "", *notes]) + "\n"


def _each(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """Show a value of each seed."""
    return ", ".join(f"{run[key]:{form}}" for run in runs)


if __name__ == "__main__":
    worker_main(measure)
