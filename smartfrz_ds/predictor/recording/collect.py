"""Records runs: the registered tasks' into a data set on disk, over processes, resumable; and reads such data sets, anybody's too.

A data set is a folder: `runs/NAME.safetensors` (recorder.py), `branches/NAME.json` (branches.py), `dataset.json` (what belongs to it,
with versions) and `README.md` (its card). Recordings that a user's own script saved into `runs/` belong to it as well.
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
from .runs import EVALUATE_EVERY, SNAPSHOT_EVERY, OptimizerKind, Regime, Run, Training, final_figures, freezing_plan, plan

DATASET_FORMAT, DATASET_VERSION = "smartfrz-dataset", 1
SAMPLE_SIZE = 256  # weights a layer

__all__ = [
    "DATASET_VERSION",
    "EVALUATE_EVERY",
    "SAMPLE_SIZE",
    "SNAPSHOT_EVERY",
    "Dataset",
    "OptimizerKind",
    "Recording",
    "Regime",
    "Run",
    "collect",
    "collect_dataset",
    "collect_script",
    "one_thread",
    "plan",
    "read_dataset",
    "record",
]

_LAST_EVALUATIONS = 3
_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Recordings in the order of their names' first appearance in dataset.json, then by name; branches of some; what they took."""

    recordings: list[Recording]
    branches: list[Branch]
    cpu_seconds: float


def record(run: Run) -> Recording:
    """Trains a registered run and records it. Deterministic in `run` on one thread; leaves the global generator as it was."""
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
        freezes = freezing_plan(run, len(training.layers))
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


def collect(run: Run, folder: Path | None = None) -> Recording:
    """The recording of a registered run, from `folder` when it is there, else made and put there. A damaged one is made anew."""
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
    """Records every run of plan(seed) and, with branches, the counterfactuals, into the folder `out`; what is there already stays.

    workers: processes, one thread each, >= 1; the files are the same for any number. Raises ValueError for anything else, and where
    `out` holds a data set of another seed, scale or version; ImportError where a package with data is missing.
    """
    if seed < 0:
        raise ValueError(f"seed: got {seed}, allowed is a whole number >= 0")
    if workers < 1:
        raise ValueError(f"workers: got {workers}, allowed is a whole number >= 1")
    runs = plan(seed, quick=quick)
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
        jobs: list[tuple[str, Run, Path]] = [("run", run, out / "runs") for run in runs]
        jobs += [("branches", run, out / "branches") for run in branched]
        missing = [job for job in jobs if not _is_there(*job)]
        if len(missing) < len(jobs):
            print(f"{len(jobs) - len(missing)} of {len(jobs)} are in {out} already", file=sys.stderr)
        for _ in _over(workers, _job, missing, "training small networks"):
            pass
    found = read_dataset(out)
    from .card import dataset_card  # here: the card of a data set needs its labels

    _write_text(out / "README.md", dataset_card(found, seed=seed, quick=quick))
    return found


def collect_script(script: Path, out: Path, arguments: Sequence[str] = ()) -> list[str]:
    """Runs somebody's training script with this Python; what its Recorder saves without a path goes into the data set `out`.

    Returns the names of the recordings that are new. Raises ValueError where the script isn't there, fails or records nothing.
    """
    if not script.is_file():
        raise ValueError(f"script: got {str(script)!r}, allowed is the path of a Python file")
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
    """All recordings and branches under `folder`. Raises ValueError where it holds none, or a damaged one."""
    file = folder / "dataset.json"
    first: list[str] = json.loads(file.read_text())["runs"] if file.is_file() else []
    order = {name: i for i, name in enumerate(first)}
    paths = sorted((folder / "runs").glob("*.safetensors"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
    if not paths:
        raise ValueError(f"{folder}: got no recording in {folder / 'runs'}; allowed: a folder made by `smartfrz collect`, or by a Recorder")
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
    """Sums in torch depend on the number of threads in their last digits: one thread makes a run repeatable."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _job(job: tuple[str, Run, Path]) -> None:
    kind, run, folder = job
    with one_thread():
        if kind == "run":
            collect(run, folder)
        else:
            collect_branches(run, folder)


def _is_there(kind: str, run: Run, folder: Path) -> bool:
    """Whether this job's file is there, whole and of this version."""
    try:
        if kind == "run":
            return dict(read_recording(folder / f"{run.name}.safetensors").tags) == run.identity
        return bool(json.loads((folder / f"{run.name}.json").read_text())["run"] == run.identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _over(
    workers: int, work: Callable[[tuple[str, Run, Path]], _Made], jobs: Sequence[tuple[str, Run, Path]], what: str
) -> Iterator[_Made]:
    """Each job's result as it is done, with a progress bar. Fresh processes: a forked one would inherit locked thread pools."""
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
        raise ValueError(f"{file}: got something that is no JSON object; allowed: a data set made by `smartfrz collect`") from error
    if there != head:
        raise ValueError(f"{file}: got a data set with {there}; allowed here: {head}. Choose another folder")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
