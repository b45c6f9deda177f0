"""What freezing a prefix costs in loss, beside what the same saving costs by fewer steps: branches and matched runs of the training kinds.

For each run: its training losses, the predictor's probabilities at the stages, the held-out loss at the end of branches that freeze a
prefix at a stage, and of full training with the schedule compressed into fewer steps.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.model.view import LayerInfo, View, Window
from smartfrz_ds.predictor.features import FeatureExtractor
from smartfrz_ds.predictor.model import load_predictor

from .runs import OPTIMIZERS, REGIMES, SETTINGS, TaskRun, Training, schedule

SHARES = (0.1, 0.2, 0.3)
"""Shares of the steps that matched runs leave out."""
STAGES = (0.3, 0.5, 0.7)
"""Shares of the run at which branches start."""
STEPS = 160
_VERSION = 1
_EVERY, _WINDOW, _SAMPLE = 4, 30, 256  # steps between snapshots, snapshots in a window, weights of a layer
_MEAN = 8  # steps of which one loss is kept, and between freezing stages


def cost_runs(seed: int = 0) -> list[TaskRun]:
    """Return the runs, every setting first: 96 short ones, of every setting, optimizer and regime.

    Args:
        seed: >= 0; another seed gives other runs of the same kinds.
    """
    runs = []
    for shift in range(len(OPTIMIZERS) * len(REGIMES)):
        for s, (net, data) in enumerate(SETTINGS):
            o, r = divmod((s + shift) % (len(OPTIMIZERS) * len(REGIMES)), len(REGIMES))
            runs.append(TaskRun(net=net, data=data, optimizer=OPTIMIZERS[o], regime=REGIMES[r], seed=seed * 100 + 50, steps=STEPS))
    return runs


def collect_costs(run: TaskRun, folder: Path) -> dict[str, Any]:
    """Load what a run's freezes and shorter runs cost, or compute and store it.

    Args:
        run: The run.
        folder: Folder with one JSON file per run. A file that is damaged or from another version is computed again.

    Returns:
        "losses": training losses, each the mean of _MEAN steps; "lr": the sums of the learning rates of these steps;
        "full": held-out losses of two full runs; "branches": step, frozen layers, of how many, the lowest probability of
        the predictor in the prefix, loss; "matched": share of the steps left out, loss; "cpu_seconds".
    """
    path = folder / f"{run.name}.json"
    if path.is_file():
        try:
            held: dict[str, Any] = json.loads(path.read_text())
            if held["run"] == {**run.identity, "costs": _VERSION}:
                return held
        except (ValueError, KeyError, TypeError):
            pass  # damaged or from another version: compute again
    began = time.process_time()
    with torch.random.fork_rng(devices=[]):
        held = {"run": {**run.identity, "costs": _VERSION}, **_measure(run)}
    held["cpu_seconds"] = round(time.process_time() - began, 2)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(held))
    os.replace(partial, path)
    return held


def _measure(run: TaskRun) -> dict[str, Any]:
    main = Training(run)
    fresh = main.fork()
    controls = [main.fork(reorder=1)]
    stages = [round(s * run.steps / _MEAN) * _MEAN for s in STAGES]
    blocks = len(main.layers)
    front = 1 + (main.layers[0].kind == "embedding")
    losses: list[float] = []
    rates: list[float] = []
    forks: list[tuple[int, int, float, Training]] = []
    judge = _Judge(main)
    while main.steps_done < run.steps:
        rates.append(main.step())
        losses.append(main.loss)
        judge.see(rates)
        if main.steps_done % _MEAN == 0 and main.steps_done < run.steps:
            lowest = judge.probabilities(rates)
            for count in sorted({front, (blocks + front) // 2, blocks}) if main.steps_done in stages else ():
                other = main.fork()
                other.freeze(count)
                forks.append((main.steps_done, count, lowest[count - 1], other))
    full = [main.figures()[1], *(_end(x, run.steps) for x in controls)]
    matched = []
    for share in SHARES:
        shorter = fresh.fork()
        shorter.total = round(run.steps * (1 - share))  # the schedule is compressed
        matched.append({"share": 1 - shorter.total / run.steps, "loss": _end(shorter, shorter.total)})
    return {
        "losses": _means(losses),
        "lr": [sum(rates[i : i + _MEAN]) for i in range(0, len(rates), _MEAN)],
        "full": full,
        "branches": [{"step": step, "frozen": count, "of": blocks, "p": p, "loss": _end(x, run.steps)} for step, count, p, x in forks],
        "matched": matched,
    }


def _end(training: Training, steps: int) -> float:
    while training.steps_done < steps:
        training.step()
    return training.figures()[1]


def _means(values: list[float]) -> list[float]:
    return [sum(values[i : i + _MEAN]) / len(values[i : i + _MEAN]) for i in range(0, len(values), _MEAN)]


class _Judge:
    """The shipped predictor, fed as in a real run."""

    def __init__(self, training: Training) -> None:
        self._training, self._model, self._extractor = training, load_predictor(None), FeatureExtractor()
        draw = torch.Generator().manual_seed(0)
        self._index = [torch.randint(sum(p.numel() for p in _matrices(x)), (_SAMPLE,), generator=draw) for x in training.layers]
        self._seen: list[tuple[int, float, list[Tensor]]] = []

    def see(self, rates: list[float]) -> None:
        step = self._training.steps_done
        if step % _EVERY == 0:
            now = [
                torch.cat([p.detach().flatten() for p in _matrices(x)])[i] for x, i in zip(self._training.layers, self._index, strict=True)
            ]
            self._seen = [*self._seen[1 - _WINDOW :], (step, sum(rates), now)]

    def probabilities(self, rates: list[float]) -> list[float]:
        """Return, for every layer, the lowest probability in the prefix that ends with it; -1 before there is one."""
        run, layers = self._training.run, self._training.layers
        infos = tuple(LayerInfo(name=x.name, kind=x.kind, numel=sum(p.numel() for p in x.params)) for x in layers)
        steps, spent = torch.tensor([s for s, _, _ in self._seen]), torch.tensor([lr for _, lr, _ in self._seen], dtype=torch.float64)
        ahead = torch.tensor([self._training.peak * schedule(run.optimizer, i / run.steps) for i in range(len(rates), run.steps)]).double()
        windows = {}
        for i, x in enumerate(infos):
            windows[x.name] = Window(steps=steps, weights=torch.stack([w[i] for _, _, w in self._seen]), lr_spent=spent)
        view = View(
            step=len(rates),
            total_steps=run.steps,
            lr_spent=sum(rates),
            lr_remaining=float(ahead.sum()),
            lr_ahead=ahead,
            layers=infos,
            frozen=(),
            candidates=tuple(x.name for x in infos),
            window_size=_WINDOW,
            windows=windows,
        )
        batch = self._extractor.extract(view)
        found = dict(zip(batch.names, self._model.probabilities(batch).tolist(), strict=True))
        return list(_lowest([found.get(x.name) if x.kind == "block" else 1.0 for x in infos]))


def _lowest(values: list[float | None]) -> Iterator[float]:
    lowest = 1.0
    for value in values:
        lowest = min(lowest, -1.0 if value is None else value)
        yield lowest


def _matrices(layer: Any) -> list[Tensor]:
    return [p for p in layer.params if p.dim() >= 2] or list(layer.params)
