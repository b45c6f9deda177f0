"""Record the runs of the registered tasks into a data set on disk, resumable and in parallel, and read data sets.

A data set is a folder with `runs/NAME.safetensors` (recorder.py), `branches/NAME.json` (branches.py), `dataset.json`
(contents and versions) and `README.md` (its card). Recordings that a user's script saves into `runs/` are part of it
as well.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from smartfrz_ds._version import __version__
from smartfrz_ds.predictor.recorder import FOLDER_VARIABLE, RECORDING_VERSION, Recorder, Recording, read_recording, write_recording

from .branches import Branch, branched_runs, collect_branches
from .runs import EVALUATE_EVERY, SNAPSHOT_EVERY, OptimizerKind, Regime, TaskRun, Training, final_figures, freezing_schedule, planned_runs

DATASET_FORMAT, DATASET_VERSION = "smartfrz-dataset", 1
SAMPLE_SIZE = 256  # weights per layer

__all__ = [
    "DATASET_VERSION",
    "EVALUATE_EVERY",
    "SAMPLE_SIZE",
    "SNAPSHOT_EVERY",
    "Dataset",
    "OptimizerKind",
    "Recording",
    "Regime",
    "TaskRun",
    "collect",
    "collect_dataset",
    "collect_script",
    "one_thread",
    "planned_runs",
    "read_dataset",
    "record",
]

_LAST_EVALUATIONS = 3
_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set in memory.

    Attributes:
        recordings: Recordings in the order of dataset.json, then by name.
        branches: Branches of some of the runs.
        cpu_seconds: Processor seconds that they took.
    """

    recordings: list[Recording]
    branches: list[Branch]
    cpu_seconds: float


def record(run: TaskRun) -> Recording:
    """Train and record a registered run. Deterministic in `run` on one thread; restores the global random state."""
    began, cpu_began = time.perf_counter(), time.process_time()
    with torch.random.fork_rng(devices=[]):
        training = Training(run)
        recorder = Recorder(
            training.net,
            training.task.probe,
            layers=training.layers,
            snapshot_interval=SNAPSHOT_EVERY,
            evaluate_interval=EVALUATE_EVERY,
            sample_size=SAMPLE_SIZE,
            seed=run.seed,
        )
        freezes = freezing_schedule(run, len(training.layers))
        figures = []
        for step in range(1, run.steps + 1):
            recorder.step(training.step())
            if step in freezes:
                training.freeze(freezes[step])
            left = run.steps - step
            if left % EVALUATE_EVERY == 0 and left < _LAST_EVALUATIONS * EVALUATE_EVERY:
                figures.append(training.figures())
        metric, loss = final_figures(figures)
        recording = recorder.finish(name=run.name, tags=run.identity, metric=metric, loss=loss)
    return replace(recording, seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - cpu_began)


def collect(run: TaskRun, folder: Path | None = None) -> Recording:
    """Load the recording of a registered run from `folder`, or create and store it there. A damaged file is replaced.

    Args:
        run: The run.
        folder: The folder; None: do not store the recording.
    """
    if folder is None:
        return record(run)
    path = folder / f"{run.name}.safetensors"
    if path.is_file():
        try:
            found = read_recording(path)
            if dict(found.tags) == run.identity:
                return found
        except ValueError:
            pass
        path.unlink()
    recording = record(run)
    write_recording(recording, path)
    return recording


def collect_dataset(out: Path, *, seed: int = 0, quick: bool = False, branches: bool = True, workers: int = 1) -> Dataset:
    """Record every run of planned_runs(seed) and optionally the branches into a data set. Existing files are kept.

    Args:
        out: Folder of the data set.
        seed: Seed of the runs, >= 0.
        quick: Five short runs instead of all.
        branches: Whether to compute the counterfactual branches.
        workers: Number of processes with one thread each, >= 1; the files do not depend on it.

    Raises:
        ValueError: A value is out of range, or `out` contains a data set of another seed, scale or version.
        ImportError: A package with data is missing.
    """
    if seed < 0:
        raise ValueError(f"seed: got {seed}; allowed: an integer >= 0")
    if workers < 1:
        raise ValueError(f"workers: got {workers}; allowed: an integer >= 1")
    runs = planned_runs(seed, quick=quick)
    branched = branched_runs(seed, quick=quick) if branches else []
    head = {"format": DATASET_FORMAT, "version": DATASET_VERSION, "recording_version": RECORDING_VERSION, "seed": seed, "quick": quick}
    file = out / "dataset.json"
    if file.is_file():
        _check_head(file, head)
    out.mkdir(parents=True, exist_ok=True)
    body = {"runs": [run.name for run in runs], "branched": [run.name for run in branched]}
    made_with = {"smartfrz_ds": __version__, "torch": torch.__version__}
    _write_text(file, json.dumps({**head, **body, "made_with": made_with}, indent=1) + "\n")
    with one_thread():
        jobs: list[tuple[str, TaskRun, Path]] = [("run", run, out / "runs") for run in runs]
        jobs += [("branches", run, out / "branches") for run in branched]
        missing = [job for job in jobs if not _is_there(*job)]
        if len(missing) < len(jobs):
            print(f"{len(jobs) - len(missing)} of {len(jobs)} are already in {out}", file=sys.stderr)
        for _ in _over(workers, _job, missing, "training small networks"):
            pass
    found = read_dataset(out)
    from .card import dataset_card  # imported here because the card needs the data set's labels

    _write_text(out / "README.md", dataset_card(found, seed=seed, quick=quick))
    return found


def collect_script(script: Path, out: Path, arguments: Sequence[str] = ()) -> list[str]:
    """Run a user's training script; what its Recorder saves without a path becomes part of the data set `out`.

    Args:
        script: Python file.
        out: Folder of the data set.
        arguments: Arguments of the script.

    Returns:
        Names of the new recordings.

    Raises:
        ValueError: The script does not exist, fails or records nothing.
    """
    if not script.is_file():
        raise ValueError(f"script: got {str(script)!r}; allowed: the path of a Python file")
    runs = out / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*.safetensors")}
    code = subprocess.run([sys.executable, str(script), *arguments], env={**os.environ, FOLDER_VARIABLE: str(runs.resolve())}).returncode
    if code:
        raise ValueError(f"script: {script} ended with exit code {code}")
    found = sorted(path.stem for path in runs.glob("*.safetensors") if before.get(path) != path.stat().st_mtime_ns)
    if not found:
        raise ValueError(f"script: {script} recorded nothing; it must call smartfrz_ds.predictor.Recorder(...).save(name=...)")
    return found


def read_dataset(folder: Path) -> Dataset:
    """Read all recordings and branches of a data set.

    Raises:
        ValueError: The folder contains no recording, or a damaged one.
    """
    file = folder / "dataset.json"
    first: list[str] = json.loads(file.read_text())["runs"] if file.is_file() else []
    order = {name: i for i, name in enumerate(first)}
    paths = sorted((folder / "runs").glob("*.safetensors"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
    if not paths:
        raise ValueError(f"{folder}: no recording in {folder / 'runs'}; allowed: a folder written by `smartfrz collect` or a Recorder")
    branches: list[Branch] = []
    seconds = 0.0
    for path in sorted((folder / "branches").glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem)):
        held = json.loads(path.read_text())
        branches += [Branch(**row) for row in held["branches"]]
        seconds += held["cpu_seconds"]
    recordings = [read_recording(path) for path in paths]
    return Dataset(recordings=recordings, branches=branches, cpu_seconds=seconds + sum(r.cpu_seconds for r in recordings))


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, because the last digits of sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _job(job: tuple[str, TaskRun, Path]) -> None:
    kind, run, folder = job
    with one_thread():
        if kind == "run":
            collect(run, folder)
        else:
            collect_branches(run, folder)


def _is_there(kind: str, run: TaskRun, folder: Path) -> bool:
    """Return whether a job's file exists, complete and of this version."""
    try:
        if kind == "run":
            return dict(read_recording(folder / f"{run.name}.safetensors").tags) == run.identity
        return bool(json.loads((folder / f"{run.name}.json").read_text())["run"] == run.identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _over(
    workers: int, work: Callable[[tuple[str, TaskRun, Path]], _Made], jobs: Sequence[tuple[str, TaskRun, Path]], what: str
) -> Iterator[_Made]:
    """Yield each job's result when it is done, with a progress bar. Uses spawn: a forked process would inherit locked thread pools."""
    if workers == 1 or not jobs:
        yield from (work(job) for job in tqdm(jobs, desc=what, unit="run"))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(jobs), desc=what, unit="run"):
            yield future.result()


def _check_head(file: Path, head: dict[str, object]) -> None:
    try:
        found = json.loads(file.read_text())
        there = {key: found.get(key) for key in head}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a JSON object; allowed: a data set written by `smartfrz collect`") from error
    if there != head:
        raise ValueError(f"{file}: got a data set with {there}; allowed: {head}. Choose another folder")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
