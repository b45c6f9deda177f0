"""`smartfrz bench policies`: the same tasks, seeds and engine for every policy and for training without freezing.

Each run uses a real DeepSpeed engine (worker.py) and writes its result to a file; a run that has a result is not repeated.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .curves import Row
from .estimate import estimate, measured_seconds
from .files import FULL, MATCHED, MATCHED_TIME, POLICIES_FILE, PoliciesFile, find_tasks, read_policies
from .plot import plot, to_csv
from .pool import Pool, result_file
from .report import Effort, report
from .runs import Job, PlannedRun, matched_run, matched_steps, plan_runs
from .setups.data import package_dir
from .setups.prepare import check_packages
from .side_by_side import Engine, check_ranks, measure_time, time_share

_NUMBERS = ("metric", "loss", "flops", "full_flops", "saved", "seconds", "cpu_seconds", "total_seconds")


def bench_policies(
    out: Path,
    *,
    tasks: Iterable[str] = (),
    policies: Sequence[str] = (),
    policies_file: Path = POLICIES_FILE,
    seeds: int | None = None,
    workers: int | None = None,
    matched: bool = True,
    matched_time: Engine | None = None,
    run: bool = True,
    plan: bool = False,
) -> str:
    """Do all runs without a result and make tables, which are also written to `out`/policies.md.

    Args:
        out: Folder of the results: runs/ has one JSON file per run, runs.csv one line per run, policies.png the curves.
        tasks: Names of shipped tasks, or paths of task files. Empty: all shipped tasks.
        policies: Names of entries in the policies file. Empty: all.
        policies_file: A YAML file with policies and their settings.
        seeds: Maximum number of seeds, >= 1; None: as in the policies file.
        workers: Number of parallel processes, >= 1; None: one per core.
        matched: Whether to run full training at the FLOPs of each freezing run.
        matched_time: The engine on which to measure the wall time of each freezing run, for full training at that time; None: do not.
        run: False: only make tables of the existing results.
        plan: Run nothing; only return the runs that are left, and their time.

    Returns:
        The tables, or the plan, as Markdown.

    Raises:
        ValueError: A wrong name, number or file; nothing was run.
        ModuleNotFoundError: A required package is not installed; nothing was run.
        RuntimeError: Runs failed; the message has the first error. All other runs and their tables are complete.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: got {workers}; allowed: an integer >= 1")
    file = read_policies(policies_file)
    chosen = find_tasks(tasks)
    planned = plan_runs(chosen, file, only=policies, seeds=seeds, source=str(policies_file))
    if matched_time is not None:
        check_ranks(chosen, matched_time)
    check_packages(p.job.settings for p in planned)
    package_dir("matplotlib")  # before the runs, not after an hour
    bench = _Bench(out, file, planned, matched, matched_time)
    most = workers or os.cpu_count() or 1
    if plan:
        return bench.plan(most)
    out.mkdir(parents=True, exist_ok=True)
    failures = bench.run(most) if run else []
    everything = [*planned, *bench.followers(planned)]
    rows = bench.rows()
    text = ""
    if rows:
        text = report(rows, _effort(out, rows, len({p.job.name for p in everything})))
        (out / "policies.md").write_text(text, encoding="utf-8")
        (out / "runs.csv").write_text(to_csv(rows), encoding="utf-8")
        plot(rows, out / "policies.png")
    if failures:
        name, error = failures[0]
        raise RuntimeError(f"{len(failures)} of {len({p.job.name for p in everything})} runs failed; {name}: {error}")
    return text


class _Bench:
    """The runs of one call: the planned ones, and the matched runs, which follow from results."""

    def __init__(self, out: Path, file: PoliciesFile, planned: Sequence[PlannedRun], matched: bool, engine: Engine | None) -> None:
        self.out, self.file, self.planned, self.matched, self.engine = out, file, planned, matched, engine
        self._full = {(p.job.task, p.job.seed): p.job for p in planned if p.entry == FULL}

    def run(self, workers: int) -> list[tuple[str, str]]:
        """Do all runs that are left: for each seed the planned ones, then their matched ones. Returns the failed ones' names and errors."""
        began, finished, failures = time.perf_counter(), 0, list[tuple[str, str]]()
        names = {p.job.name for p in self.planned}
        done = len(names) - len(self._missing(self.planned))
        workers = min(workers, max(len(names) - done, 1))
        try:
            with tqdm(total=len(names), initial=done, desc="runs", unit="run") as bar, Pool(self.out, workers) as pool:
                for jobs in self._rounds(failures):
                    names |= {job.name for job in jobs}
                    bar.total = len(names)
                    with closing(pool.run(jobs)) as ended:
                        for job, error in ended:
                            if error is None:
                                finished += 1
                            else:
                                failures.append((job.name, error))
                                bar.write(f"{job.name} failed: {error.strip().splitlines()[-1]}")
                            bar.update()
        finally:
            if finished:  # one line per call, also if it is interrupted, for the total time of the benchmark
                with (self.out / "sessions.jsonl").open("a") as file:
                    file.write(json.dumps({"runs": finished, "seconds": time.perf_counter() - began, "workers": workers}) + "\n")
        return failures

    def followers(self, planned: Iterable[PlannedRun]) -> list[PlannedRun]:
        """List the matched runs of those planned runs that have a result. Runs of the same length are one."""
        found: dict[tuple[str, str], PlannedRun] = {}
        for p in planned:
            for entry, steps in self._lengths(p).items():
                full = self._full[p.job.task, p.job.seed]
                if steps is not None and steps < full.settings.steps:
                    follower = matched_run(full, self.file.common, steps, entry)
                    found.setdefault((entry, follower.job.name), follower)
        return list(found.values())

    def rows(self) -> list[Row]:
        """Make a row for each planned and matched run that has a result."""
        rows = []
        for p in [*self.planned, *self.followers(self.planned)]:
            result = read_result(self.out, p.job)
            if result is not None:
                lengths = self._lengths(p)
                rows.append(row_of(p, result, lengths.get(MATCHED), lengths.get(MATCHED_TIME)))
        return rows

    def plan(self, workers: int) -> str:
        """Make a table of the runs that are left, with their estimated time."""
        left = self._missing([*self.planned, *self.followers(self.planned)])
        known = {p.job.name for p in self.planned if read_result(self.out, p.job) is not None}
        # The length of a matched run is known only after its freezing run; until then it counts as a full run.
        unknown = {p.job.name: p.job for p in self.planned if p.entry != FULL and p.job.name not in known} if self.matched else {}
        return estimate(self.planned, left, list(unknown.values()), measured_seconds(self.out, self.planned), workers)

    def _rounds(self, failures: list[tuple[str, str]]) -> Iterator[list[Job]]:
        for seed in sorted({p.job.seed for p in self.planned}):
            of_seed = [p for p in self.planned if p.job.seed == seed]
            yield self._missing(of_seed)
            if self.engine is not None:
                failures += self._measure_times(of_seed, self.engine)
            yield self._missing(self.followers(of_seed))

    def _measure_times(self, planned: Iterable[PlannedRun], engine: Engine) -> list[tuple[str, str]]:
        failures = []
        for job in {p.job.name: p.job for p in planned if p.entry != FULL}.values():
            result = read_result(self.out, job)
            if result is not None and result["frozen"]:
                try:
                    measure_time(job, self.out, engine)
                except RuntimeError as error:
                    failures.append((job.name, str(error)))
        return failures

    def _lengths(self, p: PlannedRun) -> dict[str, int | None]:
        """Return the lengths of a run's matched runs, as far as its result and its time are known."""
        result = None if p.entry in (FULL, MATCHED, MATCHED_TIME) else read_result(self.out, p.job)
        if result is None:
            return {}
        lengths: dict[str, int | None] = {}
        if self.matched:
            lengths[MATCHED] = matched_steps(p.full_steps, 1 - result["saved"])
        if self.engine is not None:
            share = time_share(self.out, p.job, self.engine) if result["frozen"] else 1.0
            lengths[MATCHED_TIME] = None if share is None else matched_steps(p.full_steps, share)
        return lengths

    def _missing(self, planned: Iterable[PlannedRun]) -> list[Job]:
        jobs = {p.job.name: p.job for p in planned}
        return [job for job in jobs.values() if read_result(self.out, job) is None]


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


def row_of(p: PlannedRun, result: dict[str, Any], matched: int | None, matched_time: int | None) -> Row:
    """Make the row of a run from its result. matched, matched_time: lengths of its matched runs."""
    numbers = {key: result[key] for key in _NUMBERS}
    if p.entry in (MATCHED, MATCHED_TIME):  # compared with the training that was not shortened
        share = p.job.settings.steps / p.full_steps
        numbers |= {"full_flops": result["flops"] / share, "saved": 1 - share}
    return Row(
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
        use=p.job.settings.use,
        pretrained=p.job.settings.pretrained,
        matched_steps=matched,
        matched_time_steps=matched_time,
        **numbers,
    )


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
