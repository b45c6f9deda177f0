"""The cost of `smartfrz bench policies` before it runs: runs that are left, and minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from .runs import Job, PlannedRun


def measured_seconds(out: Path, planned: Sequence[PlannedRun]) -> dict[str, float]:
    """Return the median seconds per step of the runs that exist, by task; of a task without any, what its file says."""
    known: dict[str, float] = {}
    for p in planned:
        name, declared = p.job.task, p.job.settings.seconds_per_step
        if name in known:
            continue
        seen = []
        for file in (out / "runs" / name).glob("*.json"):
            try:
                data = json.loads(file.read_text())
                seen.append(data["result"]["total_seconds"] / data["job"]["settings"]["steps"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # run again by the benchmark
        if seen:
            known[name] = median(seen)
        elif declared is not None:
            known[name] = declared
    return known


def estimate(planned: Sequence[PlannedRun], left: Sequence[Job], to_come: Sequence[Job], seconds: Mapping[str, float], workers: int) -> str:
    """Make a table of the runs that are left, as Markdown.

    Args:
        planned: All runs whose settings are known.
        left: Those without a result, matched runs included.
        to_come: Freezing runs without a result. Each is followed by a matched run, which counts as long as full training.
        seconds: Seconds per step, by task.
        workers: Number of parallel processes.
    """
    lines, total, unknown = [], 0.0, []
    for task in dict.fromkeys(p.job.task for p in planned):
        steps = sum(job.settings.steps for job in (*left, *to_come) if job.task == task)
        count = sum(job.task == task for job in (*left, *to_come))
        use = next(p.job.settings.use for p in planned if p.job.task == task)
        if task in seconds:
            total += steps * seconds[task]
            cost = f"{steps * seconds[task] / 60:.0f}"
        else:
            unknown.append(task)
            cost = "unknown"
        lines.append(f"| {task} | {use} | {count} | {steps} | {cost} |")
    text = "| task | use | runs left | steps | minutes of one worker, at most |\n| --- | --- | --- | --- | --- |\n" + "\n".join(lines)
    text += f"\n\nAt most {total / 3600:.1f} hours of one worker, {total / workers / 3600:.1f} hours with {workers}."
    text += " Full cost is assumed for runs that will freeze, and for their matched runs."
    if unknown:
        text += f" Not included, since no run exists and the task file has no seconds_per_step: {', '.join(unknown)}."
    return text
