"""`smartfrz bench policies`: the same tasks, seeds and engine for every policy and for training without freezing.

Each run uses a real DeepSpeed engine (worker.py) and writes its result to a file; a run that has a result is not repeated.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .curves import Row
from .files import POLICIES_FILE, Job, PlannedRun, find_tasks, plan_runs, read_policies
from .nets import check_packages, package_dir
from .pool import result_file, run_all
from .report import Effort, plot, report, to_csv

_NUMBERS = ("metric", "loss", "flops", "full_flops", "saved", "seconds", "cpu_seconds", "total_seconds")


def bench_policies(
    out: Path,
    *,
    tasks: Iterable[str] = (),
    policies: Sequence[str] = (),
    policies_file: Path = POLICIES_FILE,
    seeds: int | None = None,
    workers: int | None = None,
    run: bool = True,
) -> str:
    """Do all runs without a result and make tables, which are also written to `out`/policies.md.

    Args:
        out: Folder of the results: runs/ has one JSON file per run, runs.csv one line per run, policies.png the curves.
        tasks: Names of shipped tasks, or paths of task files. Empty: all shipped tasks.
        policies: Names of entries in the policies file. Empty: all.
        policies_file: A YAML file with policies and their settings.
        seeds: Maximum number of seeds, >= 1; None: as in the policies file.
        workers: Number of parallel processes, >= 1; None: one per core.
        run: False: only make tables of the existing results.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: A wrong name, number or file; nothing was run.
        ModuleNotFoundError: A required package is not installed; nothing was run.
        RuntimeError: Runs failed; the message has the first error. All other runs and their tables are complete.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: got {workers}; allowed: an integer >= 1")
    planned = plan_runs(find_tasks(tasks), read_policies(policies_file), only=policies, seeds=seeds, source=str(policies_file))
    check_packages(p.job.settings for p in planned)
    package_dir("matplotlib")  # before the runs, not after an hour
    jobs = list({p.job.name: p.job for p in planned}.values())
    missing = [job for job in jobs if read_result(out, job) is None]
    workers = min(workers or os.cpu_count() or 1, max(len(missing), 1))
    out.mkdir(parents=True, exist_ok=True)
    failures = _run(missing, out, workers, len(jobs) - len(missing)) if run else []
    rows = rows_of(out, planned)
    text = ""
    if rows:
        text = report(rows, _effort(out, rows, len(jobs)))
        (out / "policies.md").write_text(text, encoding="utf-8")
        (out / "runs.csv").write_text(to_csv(rows), encoding="utf-8")
        plot(rows, out / "policies.png")
    if failures:
        job, error = failures[0]
        raise RuntimeError(f"{len(failures)} of {len(jobs)} runs failed; {job.name}: {error}")
    return text


def _run(jobs: Sequence[Job], out: Path, workers: int, done: int) -> list[tuple[Job, str]]:
    """Run the jobs with a progress bar. Returns the failed ones with their errors. done: number of earlier results."""
    began, finished, failures = time.perf_counter(), 0, list[tuple[Job, str]]()
    try:
        with tqdm(total=done + len(jobs), initial=done, desc="runs", unit="run") as bar, closing(run_all(jobs, out, workers)) as ended:
            for job, error in ended:
                if error is None:
                    finished += 1
                else:
                    failures.append((job, error))
                    bar.write(f"{job.name} failed: {error.strip().splitlines()[-1]}")
                bar.update()
    finally:
        if finished:  # one line per call, also if it is interrupted, for the total time of the benchmark
            with (out / "sessions.jsonl").open("a") as file:
                file.write(json.dumps({"runs": finished, "seconds": time.perf_counter() - began, "workers": workers}) + "\n")
    return failures


def read_result(out: Path, job: Job) -> dict[str, Any] | None:
    """Read the result of a job; None where it is missing, damaged or of another job."""
    try:
        data = json.loads(result_file(out, job).read_text())
        result: dict[str, Any] = data["result"]
        whole = data["job"] == job.to_json() and all(isinstance(result[key], float) for key in _NUMBERS)
        whole = whole and all(isinstance(result[key], list) for key in ("layers", "frozen", "warnings"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if whole else None


def rows_of(out: Path, planned: Iterable[PlannedRun]) -> list[Row]:
    """Make a row for each planned run that has a result."""
    rows = []
    for p in planned:
        result = read_result(out, p.job)
        if result is not None:
            rows.append(
                Row(
                    task=p.job.task,
                    entry=p.entry,
                    label=p.label,
                    seed=p.job.seed,
                    steps=p.job.settings.steps,
                    run=p.job.name,
                    layers=len(result["layers"]),
                    frozen=sum(len(names) for _, names in result["frozen"]),
                    first_freeze=min((step for step, _ in result["frozen"]), default=None),
                    warnings=tuple(result["warnings"]),
                    **{key: result[key] for key in _NUMBERS},
                )
            )
    return rows


def _effort(out: Path, rows: Sequence[Row], planned: int) -> Effort:
    sessions = []
    file = out / "sessions.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            sessions.append(json.loads(line))
        except ValueError:
            continue  # a call that was killed while writing
    seconds = {row.run: row.total_seconds for row in rows}
    return Effort(
        done=len(seconds),
        planned=planned,
        run_seconds=sum(seconds.values()),
        wall_seconds=sum(s["seconds"] for s in sessions),
        calls=len(sessions),
        workers=max((s["workers"] for s in sessions), default=0),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
    )
