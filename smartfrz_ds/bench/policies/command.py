"""`smartfrz bench policies`: the same tasks, seeds and engine for every policy and for training without freezing.

Each run is one process with a real DeepSpeed engine (policies_worker.py); its result is a file, and what is there is not run again.
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

from .files import POLICIES_FILE, Job, Planned, find_tasks, plan, read_policies
from .nets import check_packages, package_dir
from .pool import result_file, run_all
from .report import Row, Took, plot, report, to_csv

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
    """Do all runs that are not done yet and return the tables (Markdown), which also go to `out`/policies.md.

    out: a folder: runs/ has one JSON a run, runs.csv one line a run, policies.png the curves. tasks: names of shipped tasks or paths of
    task files, none: all. policies: names in the policies' file, none: all. seeds: at most so many, >= 1. workers: processes at a time,
    >= 1; None: one for each core. run: False: tables of what is there.

    Raises:
        ValueError: a wrong name or number, a file with mistakes (which, where, what is allowed). Nothing was run.
        ModuleNotFoundError: a package that is needed is not installed. Nothing was run.
        RuntimeError: runs failed, with the first one's error; all others were done, and their tables are written.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: got {workers}; allowed: an integer >= 1")
    planned = plan(find_tasks(tasks), read_policies(policies_file), only=policies, seeds=seeds, source=str(policies_file))
    check_packages(p.job.settings for p in planned)
    package_dir("matplotlib")  # now, not after an hour of runs
    jobs = list({p.job.name: p.job for p in planned}.values())
    missing = [job for job in jobs if read_result(out, job) is None]
    workers = min(workers or os.cpu_count() or 1, max(len(missing), 1))
    out.mkdir(parents=True, exist_ok=True)
    failures = _run(missing, out, workers, len(jobs) - len(missing)) if run else []
    rows = rows_of(out, planned)
    text = ""
    if rows:
        text = report(rows, _took(out, rows, len(jobs)))
        (out / "policies.md").write_text(text, encoding="utf-8")
        (out / "runs.csv").write_text(to_csv(rows), encoding="utf-8")
        plot(rows, out / "policies.png")
    if failures:
        job, error = failures[0]
        raise RuntimeError(f"{len(failures)} of {len(jobs)} runs failed; {job.name}: {error}")
    return text


def _run(jobs: Sequence[Job], out: Path, workers: int, done: int) -> list[tuple[Job, str]]:
    """Runs the jobs under a progress bar; those that failed, with what went wrong. done: runs that were there before."""
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
        if finished:  # a line a call, an interrupted one too, so that the time of the whole bench can be told
            with (out / "sessions.jsonl").open("a") as file:
                file.write(json.dumps({"runs": finished, "seconds": time.perf_counter() - began, "workers": workers}) + "\n")
    return failures


def read_result(out: Path, job: Job) -> dict[str, Any] | None:
    """The result of a job; None where there is none, or a damaged one, or one of another job."""
    try:
        data = json.loads(result_file(out, job).read_text())
        result: dict[str, Any] = data["result"]
        whole = data["job"] == job.to_json() and all(isinstance(result[key], float) for key in _NUMBERS)
        whole = whole and all(isinstance(result[key], list) for key in ("layers", "frozen", "warnings"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if whole else None


def rows_of(out: Path, planned: Iterable[Planned]) -> list[Row]:
    """A row for each planned run that has a result."""
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


def _took(out: Path, rows: Sequence[Row], planned: int) -> Took:
    sessions = []
    file = out / "sessions.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            sessions.append(json.loads(line))
        except ValueError:
            continue  # a call that was killed as it wrote
    seconds = {row.run: row.total_seconds for row in rows}
    return Took(
        done=len(seconds),
        planned=planned,
        run_seconds=sum(seconds.values()),
        wall_seconds=sum(s["seconds"] for s in sessions),
        calls=len(sessions),
        workers=max((s["workers"] for s in sessions), default=0),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
    )
