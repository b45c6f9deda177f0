"""Fit the predictor's two judges, and score each network kind, data set and seed with predictors that never saw it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from smartfrz_ds.predictor.model import FreezePredictor, Judge, PredictorConfig, standardize

from .dataset import Examples
from .evaluate import platt

AXES = {"network kind": "net", "data set": "data", "seed": "seed"}
"""What is held out, one value at a time: display name -> tag of a recording."""

UNKNOWN_LR_SHARE = 0.25
"""Share of the training examples for which the remaining learning rate is hidden."""

_EPOCHS, _BATCH, _LR, _WEIGHT_DECAY = 4, 512, 3e-3, 2.0  # more epochs or less decay rank windows of unseen kinds worse
_MIN_STEPS = 100  # for the quick scale, in which four epochs are only a few steps


def fit(examples: Examples, config: PredictorConfig, seed: int) -> FreezePredictor:
    """Fit a new predictor, with the same weight for every run; not calibrated. Deterministic on one thread.

    The judge with the probe learns from the examples with probe features; without any, it stays unfitted.

    Args:
        examples: Training examples.
        config: Hyper-parameters.
        seed: Seed of initial weights, dropout and batches.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout
        torch.manual_seed(seed)
        model = FreezePredictor(config)
        _fit_judge(model.weights, examples, with_probe=False, generator=torch.Generator().manual_seed(seed))
        probed = examples.where(examples.probed)
        if len(probed):
            _fit_judge(model.probe, probed, with_probe=True, generator=torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def judge_logits(judge: Judge, examples: Examples, *, with_probe: bool) -> Tensor:
    """Return the judge's logits, minimized over each prefix: (m,) fp32; NaN for examples without required probe features."""
    inputs = _inputs(examples, with_probe)
    parts = [judge(examples.tokens[i : i + 4096], examples.mask[i : i + 4096], inputs[i : i + 4096]) for i in range(0, len(examples), 4096)]
    logits = torch.cat(parts) if parts else torch.zeros(0)
    if with_probe:
        logits = logits.where(examples.probed, torch.full((), torch.inf))
    lowest = examples.prefix_minimum(logits)
    return lowest.where(examples.probed, torch.full((), torch.nan)) if with_probe else lowest


@torch.no_grad()
def score(model: FreezePredictor, examples: Examples) -> Tensor:
    """Return the probability of every example as in FreezePredictor.probabilities: (m,) fp32."""
    parts = [
        model(examples.tokens[i : i + 4096], examples.mask[i : i + 4096], examples.scalars[i : i + 4096], examples.probe[i : i + 4096])
        for i in range(0, len(examples), 4096)
    ]
    return examples.prefix_minimum(torch.cat(parts).sigmoid())


def folds(examples: Examples, axes: Iterable[str]) -> list[tuple[str, str]]:
    """Return (axis, value) for everything that can be held out: tags with at least two values."""
    found = []
    for axis in axes:
        values = sorted({str(run.get(AXES[axis])) for run in examples.runs})
        found += [(axis, value) for value in values if len(values) > 1]
    return found


def held_out_scores(
    examples: Examples,
    fitted: Callable[[Examples], list[Callable[[Examples], Tensor]]],
    names: list[str],
    axes: Iterable[str] = tuple(AXES),
    progress: str = "fitting with one left out",
    workers: int = 1,
) -> dict[str, dict[str, Tensor]]:
    """Score each example by predictors that never saw its value of a tag.

    Args:
        examples: The examples.
        fitted: Maps training examples to scorers, in the order of `names`.
        names: Names of the scorers.
        axes: Keys of AXES to hold out.
        progress: Text of the progress bar.
        workers: Number of processes; the scores do not depend on it.

    Returns:
        Name -> axis -> scores (m,), NaN without a predictor.
    """
    axes = tuple(axes)
    scores = {name: {axis: torch.full((len(examples),), torch.nan) for axis in axes} for name in names}
    jobs = folds(examples, axes)

    def one(job: tuple[str, str]) -> list[np.ndarray] | None:
        out = _having(examples, *job)
        train, test = examples.where(~out), examples.where(out)
        if len(train.label.unique()) < 2:
            return None
        return [scorer(test).float().numpy() for scorer in fitted(train)]

    for job, found in zip(jobs, tqdm(_mapped(one, jobs, workers), total=len(jobs), desc=progress, unit="fit"), strict=True):
        for name, values in zip(names, found or [], strict=False):
            scores[name][job[0]][_having(examples, *job)] = torch.from_numpy(values)
    return scores


def _having(examples: Examples, axis: str, value: str) -> Tensor:
    return torch.tensor([str(run.get(AXES[axis])) == value for run in examples.runs])[examples.run]


_job: Callable[[tuple[str, str]], Any] | None = None  # called by a forked worker, to which a closure cannot be sent


def _call(job: tuple[str, str]) -> Any:
    assert _job is not None
    return _job(job)


def _mapped(work: Callable[[tuple[str, str]], Any], jobs: list[tuple[str, str]], workers: int) -> Iterator[Any]:
    """Yield work(job) of each job, in order. Forked processes share the examples without a copy and run on one thread."""
    global _job
    if workers == 1:
        yield from map(work, jobs)
        return
    _job = work
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_call, jobs)
        pool.close()
        pool.join()
    _job = None


def calibrated_apart(logits: Tensor, examples: Examples, field: str) -> Tensor:
    """Convert held-out logits (m,) to probabilities (m,), each value of a tag calibrated on the other values' logits only."""
    out = torch.full_like(logits, torch.nan)
    of_run = [str(run.get(field)) for run in examples.runs]
    for value in sorted(set(of_run)):
        here = torch.tensor([x == value for x in of_run])[examples.run]
        scale, offset = platt(logits[~here], examples.label[~here], examples.weight[~here])
        out[here] = (scale * logits[here] + offset).sigmoid()
    return out


def _inputs(examples: Examples, with_probe: bool) -> Tensor:
    return torch.cat([examples.scalars, examples.probe.nan_to_num(0.0)], 1) if with_probe else examples.scalars


def _fit_judge(judge: Judge, examples: Examples, *, with_probe: bool, generator: torch.Generator) -> None:
    inputs, blind = _inputs(examples, with_probe), _inputs(examples.without_lr(), with_probe)
    standardize(judge, examples.tokens, examples.mask, inputs)
    _fit_linear(judge, examples, inputs, blind)
    others = [p for name, p in judge.named_parameters() if not name.startswith("linear.")]
    optimizer = torch.optim.AdamW(others, lr=_LR, weight_decay=_WEIGHT_DECAY)
    batches = max(1, len(examples) // _BATCH)
    epochs = max(_EPOCHS, _MIN_STEPS // batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    label = examples.label.float()
    for _ in range(epochs):
        for index in torch.randperm(len(examples), generator=generator).chunk(batches):
            unknown = torch.rand(len(index), generator=generator) < UNKNOWN_LR_SHARE
            scalars = torch.where(unknown[:, None], blind[index], inputs[index])
            logits = judge(examples.tokens[index], examples.mask[index], scalars)
            loss = F.binary_cross_entropy_with_logits(logits, label[index], examples.weight[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _fit_linear(judge: Judge, examples: Examples, inputs: Tensor, blind: Tensor) -> None:
    """Fit the linear part to the optimum of logistic regression; attention then learns corrections, starting from none.

    Fitted together, the linear part ends far from its optimum, with worse figures on held-out data.
    """
    features = judge.scale(torch.cat([inputs, blind]))
    weight = torch.cat([(1 - UNKNOWN_LR_SHARE) * examples.weight, UNKNOWN_LR_SHARE * examples.weight])
    label = examples.label.float().repeat(2)
    optimizer = torch.optim.LBFGS(
        judge.linear.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-10
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(judge.linear(features)[:, 0], label, weight)
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    last = judge.verdict[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
