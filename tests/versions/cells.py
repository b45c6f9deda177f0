"""Runs the exactness, checkpoint and pipeline cells with the DeepSpeed that is first on the path. `python cells.py FILE GROUP …`

A cell is compared as the tests of tests/engines compare it. If it differs, or does not run, the same cell runs with nothing frozen, and
that says whose fault it is:
  passed         as with the newest DeepSpeed
  as unfrozen    no further from the single process than the unfrozen engine is from its own; frozen weights do not move
  DeepSpeed      this DeepSpeed does not run the cell with nothing frozen either
  not supported  refused at the start, by name
  failed         none of these
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
from engines import test_checkpoint, test_exact, test_pipeline
from helpers import RanksFailed, run_worker
from packaging.version import Version
from reference.bounds import FACTOR, distance
from reference.oracle import Cell, reference
from safetensors.torch import load_file
from workers import worker_pipeline

Verdict = tuple[str, str]
Check = Callable[[Path, str], None]
Deviation = Callable[[Path, str], float]

REFUSED = ("does not work", "can't be cut", "cannot tell", "not supported", "has no ")
ALLOW = {"untested_versions": "allow"}
"""A release that is not among the tested ones is tested here, so it does not check itself."""
ALONE = 90  # seconds for one cell by itself: one that waits for a rank that failed is ended after this


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells that one launch runs.

    Attributes:
        worker: The name of the worker in tests/workers.
        jobs: The job of each cell, by name; what differs with nothing frozen is its "plan".
        check: Raises AssertionError where a cell's results differ.
        deviation: How far a cell's results are from what they should be, frozen or not; infinite where that cannot be said.
        bf16: The names of cells in bf16, whose roundings are coarser.
    """

    worker: str
    jobs: dict[str, dict[str, Any]]
    check: Check
    deviation: Deviation
    bf16: frozenset[str] = frozenset()


def allowed(cell: Cell) -> Cell:
    """The cell with `ALLOW` among its settings."""
    return dataclasses.replace(cell, config={**cell.config, "smartfrz": {**cell.config.get("smartfrz", {}), **ALLOW}})


def exact_group(*names: str) -> Group:
    cells = {name: test_exact.CELLS[name] for name in names}

    def deviation(folder: Path, name: str) -> float:
        cell = next(Cell(**job) for job in json.loads((folder / "job.json").read_text()) if job["name"] == name)
        fact = json.loads((folder / f"{name}.0.json").read_text())
        if fact["wrapper"] == "BF16_Optimizer":  # before 0.17.6 stage 0 in bf16 has this wrapper, whose arithmetic is that of stage 1
            cell = dataclasses.replace(cell, stage=1)
        if fact["drift"] or fact["step"] != cell.steps:
            return float("inf")
        got, expected = load_file(folder / f"{name}.0.safetensors")["weights"], reference(cell)
        return max(distance(*pair) for pair in zip(got, expected.weights, strict=True))

    def check(folder: Path, name: str) -> None:
        if cells[name].stage == 0 and json.loads((folder / f"{name}.0.json").read_text())["wrapper"] == "BF16_Optimizer":
            assert deviation(folder, name) == 0.0, f"{deviation(folder, name):.1e} off"
        else:
            test_exact.test_equals_single_process(lambda _: folder, name)

    return Group(
        "exact",
        {name: dataclasses.asdict(allowed(cell)) for name, cell in cells.items()},
        check,
        deviation,
        frozenset(name for name, cell in cells.items() if cell.dtype == "bf16"),
    )


def checkpoint_group(*names: str, universal: bool = False) -> Group:
    saves, back = ([10], []) if universal else ([5, 10], [5])

    def saw(folder: Path) -> Callable[..., dict[str, Any]]:
        return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())

    def check(folder: Path, name: str) -> None:
        test_checkpoint.check_resume((folder, saw(folder)), name, saves, back)
        if name in ("z1", "z2", "z3"):
            test_checkpoint.check_zero_to_fp32(folder / name, saves)
        if universal:
            test_checkpoint.check_universal(folder / name, folder / f"{name}-on-one-rank")

    def deviation(folder: Path, name: str) -> float:
        seen = saw(folder)(name)
        return max(now["worst"] + (not now["start"][0]) for kind in ("resumed", "rolled_back") for now in seen[kind].values())

    jobs = {n: {"name": n, "cell": dataclasses.asdict(allowed(test_checkpoint.CELLS[n])), "saves": saves, "back": back} for n in names}
    return Group("checkpoint", jobs, check, deviation, frozenset(n for n in names if "bf16" in n))


def pipeline_group(*names: str) -> Group:
    def deviation(folder: Path, name: str) -> float:
        case = json.loads((folder / "job.json").read_text())[0]
        expected = worker_pipeline.reference(case, 1)["weights"]
        return distance(load_file(folder / f"{name}.safetensors")["weights"], expected)

    jobs = {name: {k: v for k, v in test_pipeline.CASES[name].items() if k != "plain"} for name in names}
    for job in jobs.values():
        job["smartfrz"] = {**job.get("smartfrz", {}), **ALLOW}
    return Group("pipeline", jobs, lambda folder, name: test_pipeline.check(folder, name, 2), deviation, frozenset({"bf16-z0", "bf16-z1"}))


GROUPS: dict[str, Group] = {
    "stage 0": exact_group("z0-fp32-clip0.0-prefix-gas2", "z0-bf16-clip0.0-prefix-gas1", "z0-kept-prefix"),
    "stage 1": exact_group(
        "z1-fp32-clip0.0-prefix-gas2",
        "z1-fp32-clip0.7-prefix-gas1",
        "z1-bf16-clip0.0-middle-gas1",
        "z1-emptied-prefix",
        "z1-groups2-middle",
    ),
    "stage 2": exact_group(
        "z2-fp32-clip0.0-prefix-gas2", "z2-fp32-clip0.7-prefix-gas1", "z2-bf16-clip0.0-middle-gas1", "z2-kept-prefix", "z2-overlap-prefix"
    ),
    "stage 3": exact_group(
        "z3-fp32-clip0.0-prefix-gas2",
        "z3-fp32-clip0.7-prefix-gas1",
        "z3-bf16-clip0.0-middle-gas1",
        "z3-subgroups-prefix",
        "z3-tight-prefix",
    ),
    "offload": exact_group(
        "z1-offload-prefix", "z2-offload-prefix", "z2-offload-gas2-prefix", "z3-offload-prefix", "z3-offload-params-prefix"
    ),
    "BF16_Optimizer": exact_group("z1-bf16optimizer-prefix", "z1-bf16optimizer-kept-prefix"),
    "checkpoints": checkpoint_group("z0", "z1", "z2", "z1-bf16optimizer", "z3-subgroups"),
    "universal": checkpoint_group("z2", "z3", universal=True),
    "pipelines": pipeline_group("z0", "z1", "z1-clip", "bf16-z1", "checkpointing", "kept"),
}


def run_group(group: Group) -> dict[str, Verdict]:
    """All cells in one launch, and each that has a fault by itself, with and without freezes."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_worker(group.worker, list(group.jobs.values()), Path(folder), timeout=60 * len(group.jobs))
        except RanksFailed:
            return {name: run_alone(group, name) for name in group.jobs}
        return {name: ("passed", "") if differs(group, Path(folder), name) is None else run_alone(group, name) for name in group.jobs}


def run_alone(group: Group, name: str) -> Verdict:
    """One cell by itself, and the same with nothing frozen where it does not pass."""
    frozen, why = attempt(group, name, group.jobs[name])
    if frozen is not None and not why:
        return "passed", ""
    if frozen is None and any(words in why for words in REFUSED):
        return "not supported", why
    unfrozen, reason = attempt(group, name, without_plan(group.jobs[name]), check=False)
    if unfrozen is None and not any(words in reason for words in REFUSED):
        return "DeepSpeed", f"with nothing frozen: {reason}"
    if frozen is None:
        return "failed", why
    if unfrozen is None:
        return "failed", f"{why}; with nothing frozen {reason}"
    bound = FACTOR[test_exact.DTYPES["bf16" if name in group.bf16 else "fp32"]] * unfrozen
    said = f"{frozen:.1e} off, with nothing frozen {unfrozen:.1e}"
    return ("as unfrozen" if 0 < frozen <= bound else "failed"), f"{said}{'' if 0 < frozen <= bound else f'; {why}'}"


def without_plan(job: dict[str, Any]) -> dict[str, Any]:
    return job | {"cell": job["cell"] | {"plan": {}}} if "cell" in job else job | {"plan": {}}


def attempt(group: Group, name: str, job: dict[str, Any], *, check: bool = True) -> tuple[float | None, str]:
    """Run one cell. Returns its deviation, None if it did not run, and the reason for a fault."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_worker(group.worker, [job], Path(folder), timeout=ALONE)
        except RanksFailed as error:
            return None, cause(str(error))
        why = differs(group, Path(folder), name) if check else None
        return group.deviation(Path(folder), name), why or ""


def differs(group: Group, folder: Path, name: str) -> str | None:
    """The reason why a cell's results are not what they should be; None if they are."""
    try:
        group.check(folder, name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name}: {where.line}; {str(error)[:300]}"
    return None


def cause(output: str) -> str:
    """The first error that a rank printed. An error that it caused in turn is not of interest."""
    errors = re.findall(r"^(?:\[rank\d+\]: )?(\w[\w.]*(?:Error|Exception|Disagree|Gradients)): (.*)", output, re.MULTILINE)
    first = next((f"{kind}: {text}" for kind, text in errors if not text.startswith("case ") and "Connection" not in text), "")
    return first[:400] or output[-400:]


def main(result: Path, names: Sequence[str]) -> None:
    """Run groups and write their verdicts, group by group."""
    if Version(deepspeed.__version__) < Version("0.19.8"):
        os.environ["SMARTFRZ_MEND_DEEPSPEED"] = "1"  # ranks.mend_deepspeed, in the ranks with and without freezes
    done: dict[str, dict[str, Verdict]] = json.loads(result.read_text()) if result.exists() else {}
    for name in names:
        done[name] = run_group(GROUPS[name])
        result.write_text(json.dumps(done, indent=1))
        print(name, {cell: verdict[0] for cell, verdict in done[name].items()}, flush=True)
        for cell, (verdict, why) in done[name].items():
            if verdict not in ("passed",):
                print(f"    {cell}: {verdict}: {why}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(GROUPS))
