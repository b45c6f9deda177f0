"""Counterfactual branches: freeze the first layers in the middle of a run, train to the end, and measure the cost.

Similarity labels only approximate this ground truth. A branch sees the same data in the same order as the run it
starts from.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .runs import EVALUATE_EVERY, OPTIMIZERS, REGIMES, SETTINGS, TaskRun, Training, final_figures, planned_runs

STAGES = (0.25, 0.5, 0.75)
"""Shares of the run at which branches start, rounded to _STAGE_STEPS."""
HARMLESS = 0.01
"""A branch is harmless if it costs less than one point of accuracy."""

_STAGE_STEPS = 40  # a multiple of the freezing interval at snapshot spacings of 2, 4 and 8 steps
_LAST_EVALUATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One counterfactual.

    Attributes:
        run: Name of the run.
        step: Step of the freeze.
        frozen: Number of frozen front layers, including the embedding.
        cost: Accuracy of the unfrozen controls minus that of the branch, 0..1.
        loss_cost: Loss of the branch / loss of the controls, minus 1.
        noise: Standard deviation of the controls' accuracies.
    """

    run: str
    step: int
    frozen: int
    cost: float
    loss_cost: float
    noise: float


def branched_runs(seed: int = 0, *, quick: bool = False) -> list[TaskRun]:
    """Return the runs of `planned_runs` to branch: 18 without freezes, from every setting, optimizer and regime.

    Args:
        seed: Seed of `planned_runs`.
        quick: Return one short run, for a test.
    """
    runs = [run for run in planned_runs(seed, quick=quick) if not run.freezes]
    if quick:
        return runs[:1]
    chosen = []
    for s, (net, data) in enumerate(SETTINGS):
        for extra in (0, 1)[: 1 + s % 2]:
            optimizer, regime = OPTIMIZERS[(s // 2 + s + 2 * extra) % 4], REGIMES[(s // 2 + extra) % 2]
            chosen += [r for r in runs if (r.net, r.data, r.optimizer, r.regime) == (net, data, optimizer, regime)]
    return chosen


def branch(run: TaskRun) -> list[Branch]:
    """Train a run and all of its branches.

    At each stage, branches freeze the first block, half of the body, and all of it. Deterministic on one thread.
    """
    with torch.random.fork_rng(devices=[]):
        main = Training(run)
        stages = sorted({max(1, round(s * run.steps / _STAGE_STEPS)) * _STAGE_STEPS for s in STAGES})
        blocks = len(main.layers)
        front = 1 + (main.layers[0].kind == "embedding")
        branches: list[tuple[int, int, Training]] = []
        controls = []
        while main.steps_done < min(run.steps, stages[-1]):
            main.step()
            if main.steps_done in stages:
                for count in sorted({front, (blocks + front) // 2, blocks}):
                    other = main.fork()
                    other.freeze(count)
                    branches.append((main.steps_done, count, other))
                if main.steps_done == stages[0]:
                    controls.append(main.fork(reorder=1))
        ends = [_to_the_end(training) for training in (main, *controls)]
        accuracy = torch.tensor([a for a, _ in ends], dtype=torch.float64)
        loss = sum(x for _, x in ends) / len(ends)
        results = []
        for step, count, training in branches:
            a, x = _to_the_end(training)
            results.append(
                Branch(
                    run=run.name,
                    step=step,
                    frozen=count,
                    cost=float(accuracy.mean()) - a,
                    loss_cost=x / loss - 1,
                    noise=float(accuracy.std()),
                )
            )
    return results


def collect_branches(run: TaskRun, folder: Path) -> tuple[list[Branch], float]:
    """Load the branches of a run, or compute and store them.

    Args:
        run: The run.
        folder: Folder with one JSON file per run. A file that is damaged or from another version is computed again.

    Returns:
        The branches and the processor seconds that they took.
    """
    path = folder / f"{run.name}.json"
    if path.is_file():
        try:
            held = json.loads(path.read_text())
            if held["run"] == run.identity:
                return [Branch(**row) for row in held["branches"]], float(held["cpu_seconds"])
        except (ValueError, KeyError, TypeError):
            pass  # damaged or from another version: compute again
    began = time.process_time()
    branches = branch(run)
    seconds = time.process_time() - began
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    held = {"run": run.identity, "branches": [asdict(b) for b in branches], "cpu_seconds": seconds}
    partial.write_text(json.dumps(held, indent=1))
    os.replace(partial, path)
    return branches, seconds


def _to_the_end(training: Training) -> tuple[float, float]:
    values = []
    total = training.run.steps
    while training.steps_done < total:
        training.step()
        left = total - training.steps_done
        if left % EVALUATE_EVERY == 0 and left < _LAST_EVALUATIONS * EVALUATE_EVERY:
            values.append(training.figures())
    return final_figures(values)
