"""Makes a predictor from nothing: trains the small networks, labels what they did, fits the attention network, and says how good it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .card import write_card
from .collect import Recording, collect, plan
from .dataset import Examples, make_examples
from .evaluate import PRECISION_TARGET, baselines, choose_threshold, evaluate
from .features import SCALAR_FEATURES
from .labels import CONVERGED
from .model import FreezePredictor, PredictorConfig, parameter_count, save_predictor, standardize

AXES = {"network kind": "net", "data set": "data", "seed": "seed"}
"""What is held out, one value after the other: the name for people, the field of Run."""

_EPOCHS, _BATCH, _LR, _WEIGHT_DECAY = 4, 512, 3e-3, 2.0  # more epochs or less decay rank windows of unseen kinds worse
_MIN_STEPS = 100  # of the quick scale, where four epochs are a handful of steps
_UNKNOWN_LR_SHARE = 0.25  # share of the training examples that are shown without the remaining learning rate


def train_predictor(*, out: Path, seed: int = 0, quick: bool = False, cache: Path | None = None) -> dict[str, Any]:
    """Makes a predictor and its card.

    out: the safetensors file to write; the card goes beside it, with the suffix .md.
    seed: >= 0, decides every run and initialisation; the same seed on the same versions and machine gives the same file.
    quick: four short runs instead of 112: shows that all works, not a predictor to use. Seconds instead of half an hour.
    cache: a folder for the recordings (about 2.5 MB a run), so that a run that was cut off goes on where it was.
    Returns the figures of the card, JSON-able; "held_out" and "baselines" are described at evaluate and baselines.
    Raises ValueError for an `out` or a seed that isn't possible, ImportError where scikit-learn or mlxtend is missing.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out: got {str(out)!r}, allowed is a path that ends in .safetensors")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, allowed is a whole number >= 0")
    with _one_thread():
        runs = plan(seed, quick)
        recordings = [collect(run, cache) for run in tqdm(runs, desc="training small networks", unit="run")]
        began, cpu_began = time.perf_counter(), time.process_time()
        config = PredictorConfig()
        examples = make_examples(recordings, config.window)
        scores, scores_unknown = _held_out_scores(examples, config, seed)
        threshold, precision = choose_threshold(scores["network kind"], examples.label, examples.weight)
        model = fit(examples, config, seed)
        model.threshold = threshold
        figures: dict[str, Any] = {
            "seed": seed,
            "quick": quick,
            "runs": len(runs),
            "examples": len(examples),
            "positive_share": float((examples.label * examples.weight).mean()),
            "parameters": parameter_count(model),
            "converged_similarity": CONVERGED,
            "threshold": threshold,
            "precision_target": PRECISION_TARGET,
            "precision_at_threshold": precision,
            "held_out": {axis: evaluate(scores[axis], examples, field) for axis, field in AXES.items()},
            "held_out_lr_unknown": {axis: evaluate(scores_unknown[axis], examples, field) for axis, field in AXES.items()},
            "baselines": {axis: baselines(examples, field) for axis, field in AXES.items()},
            "accuracy": _accuracies(recordings),
        }
    save_predictor(model, out, notes=figures)
    figures["seconds"] = sum(r.seconds for r in recordings) + time.perf_counter() - began
    figures["cpu_seconds"] = sum(r.cpu_seconds for r in recordings) + time.process_time() - cpu_began
    write_card(out.with_suffix(".md"), figures, out.name)
    return figures


def fit(examples: Examples, config: PredictorConfig, seed: int) -> FreezePredictor:
    """Fits a fresh predictor to the examples, every run with the same weight. Deterministic in its arguments on one thread."""
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout
        torch.manual_seed(seed)
        return _fit(examples, config, torch.Generator().manual_seed(seed))


def _fit(examples: Examples, config: PredictorConfig, generator: torch.Generator) -> FreezePredictor:
    model = FreezePredictor(config)
    standardize(model, examples.tokens, examples.mask, examples.scalars)
    _fit_linear(model, examples)
    others = [p for name, p in model.named_parameters() if not name.startswith("linear.")]
    optimizer = torch.optim.AdamW(others, lr=_LR, weight_decay=_WEIGHT_DECAY)
    batches = max(1, len(examples) // _BATCH)
    epochs = max(_EPOCHS, _MIN_STEPS // batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    label = examples.label.float()
    lr_columns = [SCALAR_FEATURES.index("log_lr_remaining"), SCALAR_FEATURES.index("lr_remaining_known")]
    for _ in range(epochs):
        for index in torch.randperm(len(examples), generator=generator).chunk(batches):
            scalars = examples.scalars[index]
            unknown = torch.rand(len(index), generator=generator) < _UNKNOWN_LR_SHARE
            scalars[unknown[:, None] & torch.isin(torch.arange(len(SCALAR_FEATURES)), torch.tensor(lr_columns))] = 0.0
            logits = model(examples.tokens[index], examples.mask[index], scalars)
            loss = F.binary_cross_entropy_with_logits(logits, label[index], examples.weight[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def _fit_linear(model: FreezePredictor, examples: Examples) -> None:
    """Brings the linear part to the optimum of logistic regression; attention then only corrects it, beginning with no correction.

    Fitted together, the two end with a linear part far from its optimum, and worse figures on whatever was held out.
    """
    unknown = examples.without_lr()
    features = model.scale(torch.cat([examples.scalars, unknown.scalars]))
    weight = torch.cat([(1 - _UNKNOWN_LR_SHARE) * examples.weight, _UNKNOWN_LR_SHARE * examples.weight])
    label = examples.label.float().repeat(2)
    optimizer = torch.optim.LBFGS(
        model.linear.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-10
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(model.linear(features)[:, 0], label, weight)
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    last = model.verdict[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


@torch.no_grad()
def score(model: FreezePredictor, examples: Examples) -> Tensor:
    """The probability of every example, as FreezePredictor.probabilities gives it: (m,) fp32."""
    parts = [
        model(examples.tokens[i : i + 4096], examples.mask[i : i + 4096], examples.scalars[i : i + 4096])
        for i in range(0, len(examples), 4096)
    ]
    return examples.prefix_minimum(torch.cat(parts).sigmoid())


def _held_out_scores(examples: Examples, config: PredictorConfig, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For every axis the probability of each example by a predictor that never saw its value there, (m,).

    Twice: with the remaining learning rate, and without it. NaN where one value is all there is.
    """
    folds = [(axis, value) for axis, field in AXES.items() for value in sorted({getattr(run, field) for run in examples.runs})]
    scores = {axis: torch.full((len(examples),), torch.nan) for axis in AXES}
    unknown = {axis: torch.full((len(examples),), torch.nan) for axis in AXES}
    for axis, value in tqdm(folds, desc="fitting with one left out", unit="fit"):
        held_out = examples.having(AXES[axis], value)
        if bool(held_out.all()):
            continue  # the quick scale has one seed and one data set: nothing is left to learn from
        model, test = fit(examples.where(~held_out), config, seed), examples.where(held_out)
        scores[axis][held_out], unknown[axis][held_out] = score(model, test), score(model, test.without_lr())
    return scores, unknown


def _accuracies(recordings: list[Recording]) -> dict[str, float]:
    """Mean held-out accuracy, 0..1, of the small networks themselves, by network, data set and regime."""
    groups: dict[str, list[float]] = {}
    for r in recordings:
        groups.setdefault(f"{r.run.net} {r.run.data} {r.run.regime}", []).append(r.accuracy)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in torch depend on the number of threads in their last digits: one thread makes a run repeatable."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
