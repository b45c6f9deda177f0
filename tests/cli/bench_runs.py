"""A tiny task for the tests of `smartfrz bench policies`, and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from smartfrz_ds.bench.policies.files import find_tasks, read_policies
from smartfrz_ds.bench.policies.runs import Job, plan_runs
from smartfrz_ds.cli.main import app

TASK = """
net: vit
data: mnist
width: 8
depth: 2
batch: 8
steps: 20
lr: 1e-2
schedule: linear
held_out: 100
"""
POLICIES_YAML = """
common: {warmup_steps: 10%, snapshot_interval: 1, freeze_interval: 10%, seed: seed}
policies:
  linear: {seeds: 1, one: {}}
  late:
    seeds: 2
    curve:
      0.5: {late: {start_step: 50%}, max_frozen_fraction: 1.0}
"""


def write_files(folder: Path) -> tuple[Path, Path]:
    task, policies = folder / "tiny.yaml", folder / "policies.yaml"
    task.write_text(TASK)
    policies.write_text(POLICIES_YAML)
    return task, policies


def command(files: tuple[Path, Path], out: Path, *more: str) -> Any:
    arguments = ["bench", "policies", "--task", str(files[0]), "--policies-file", str(files[1]), "--out", str(out), "--workers", "1", *more]
    return CliRunner().invoke(app, arguments)


def jobs(files: tuple[Path, Path]) -> dict[tuple[str, str, int], Job]:
    planned = plan_runs(find_tasks([str(files[0])]), read_policies(files[1]))
    return {(p.entry, p.label, p.job.seed): p.job for p in planned}
