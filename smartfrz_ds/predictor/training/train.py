"""Create a predictor from nothing: collect runs, label them, fit the predictor, and compare it with simpler ones."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.predictor.model import FreezePredictor, PredictorConfig, parameter_count, save_predictor
from smartfrz_ds.predictor.recording.branches import Branch
from smartfrz_ds.predictor.recording.collect import Dataset, collect_dataset, one_thread
from smartfrz_ds.predictor.recording.labels import LabelSettings

from .card import fixed_set_probabilities, write_card
from .counterfactual_eval import against_truth, branch_examples
from .dataset import Examples, make_examples
from .evaluate import PRECISION_TARGET, calibration_error, choose_threshold, evaluate, platt, reliability, rules
from .fit import AXES, calibrated_apart, fit, held_out_scores, judge_logits
from .labelling import branch_similarity, label_dataset
from .logistic_baseline import fit_regression
from .published_form import fit_reference

WEIGHTS, PROBE, BLIND = "shipped, weights alone", "shipped, with the probe", "shipped, LR unknown"
REGRESSION, REGRESSION_PROBE, PUBLISHED = "logistic regression", "logistic regression, with the probe", "published form"
_REFERENCE = {False: {"windows": 3000, "epochs": 2}, True: {"windows": 200, "epochs": 1}}  # keyed by `quick`


def train_predictor(
    *,
    out: Path,
    seed: int = 0,
    quick: bool = False,
    cache: Path | None = None,
    workers: int = 1,
    settings: LabelSettings | None = None,
) -> dict[str, Any]:
    """Create a predictor and its card.

    Args:
        out: The safetensors file; the card is written beside it with the suffix .md.
        seed: Seed of all runs and initializations, >= 0. The same seed with the same versions and machine gives the
            same file.
        quick: Five short runs instead of 144, in seconds instead of half an hour. Shows that everything works; the
            predictor is not usable.
        cache: Folder of the data set (`collect_dataset`), so that an interrupted run can be resumed; None: a
            temporary one.
        workers: Processes that collect and fit; the file does not depend on it.
        settings: The label settings; None: the defaults.

    Returns:
        The figures of the card, JSON-able.

    Raises:
        ValueError: `out`, the seed or the cache cannot be used.
        ImportError: A package with data is missing.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out: got {str(out)!r}; allowed: a path that ends in .safetensors")
    if seed < 0:
        raise ValueError(f"seed: got {seed}; allowed: an integer >= 0")
    settings = settings or LabelSettings()
    folder = nullcontext(str(cache)) if cache is not None else tempfile.TemporaryDirectory()
    with folder as name, one_thread():
        data = collect_dataset(Path(name), seed=seed, quick=quick, workers=workers)
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        labels = label_dataset(Path(name), settings)
        model, figures = _train(data, seed, quick, settings, workers)
    figures |= {"label": labels["settings"], "sensitivity": labels["sensitivity"]}
    save_predictor(model, out, notes=figures)
    figures["collect_cpu_seconds"] = data.cpu_seconds
    figures["train_seconds"], figures["train_cpu_seconds"] = time.perf_counter() - began, _cpu_seconds() - cpu_began
    write_card(out, figures)
    return figures


def _train(data: Dataset, seed: int, quick: bool, settings: LabelSettings, workers: int) -> tuple[FreezePredictor, dict[str, Any]]:
    """Return the predictor and the figures stored in its file, none of which depends on the machine's speed."""
    config = PredictorConfig()
    examples = make_examples(data.recordings, config.window, settings)
    logits = _held_out_logits(data, examples, config, seed, quick, workers)
    axis = "network kind"
    apart = {
        name: {a: calibrated_apart(x, examples, AXES[a]) for a, x in axes.items()} for name, axes in logits.items() if name != PUBLISHED
    }

    model = fit(examples, config, seed)
    chosen: dict[str, tuple[float, float | None]] = {}
    calibration = {}
    for judge, name in ((model.weights, WEIGHTS), (model.probe, PROBE)):
        calibration[name] = platt(logits[name][axis], examples.label, examples.weight)
        judge.calibration.copy_(torch.tensor(calibration[name]))
        chosen[name] = choose_threshold(apart[name][axis], examples.label, examples.weight)
    model.set_thresholds(chosen[WEIGHTS][0], chosen[PROBE][0])

    held_out = {name: {a: evaluate(x, examples, AXES[a]) for a, x in axes.items()} for name, axes in apart.items()}
    held_out[PUBLISHED] = {a: evaluate(x, examples, AXES[a], probability=False) for a, x in logits[PUBLISHED].items()}
    simple = {name: {a: evaluate(x, examples, AXES[a], probability=False) for a in AXES} for name, x in rules(examples).items()}
    diagrams = {name: reliability(apart[name][axis], examples.label, examples.weight) for name in (WEIGHTS, PROBE)}
    figures: dict[str, Any] = {
        "seed": seed,
        "quick": quick,
        "runs": len(data.recordings),
        "runs_with_freezes": sum(bool(r.tags.get("freezes")) for r in data.recordings),
        "examples": len(examples),
        "examples_with_probe": int(examples.probed.sum()),
        "positive_share": float((examples.label * examples.weight).mean()),
        "parameters": parameter_count(model),
        "threshold": model.threshold,
        "precision_target": PRECISION_TARGET,
        "at_threshold": {name: _at(chosen[name][0], apart[name][axis], examples) for name in (WEIGHTS, PROBE)},
        "calibration": calibration,
        "own_threshold": {name: threshold for name, (threshold, _) in chosen.items()},
        "reliability": diagrams,
        "calibration_error": {name: calibration_error(table) for name, table in diagrams.items()},
        "held_out": held_out,
        "rules": simple,
        "behind_frozen": _behind_frozen({name: axes[axis] for name, axes in apart.items()}, examples),
        "truth": _truth({name: axes[axis] for name, axes in logits.items()}, examples, data, settings),
        "branches": _branch_facts(data.branches),
        "accuracy": _accuracies(data),
        "fixed_set": fixed_set_probabilities(model),
    }
    return model, figures


def _held_out_logits(
    data: Dataset, examples: Examples, config: PredictorConfig, seed: int, quick: bool, workers: int
) -> dict[str, dict[str, Tensor]]:
    """Return predictor -> axis -> logits (m,) for each example by predictors that never saw its value."""

    def fitted(train: Examples) -> list[Callable[[Examples], Tensor]]:
        model = fit(train, config, seed)
        return [
            lambda test: judge_logits(model.weights, test, with_probe=False),
            lambda test: judge_logits(model.probe, test, with_probe=True),
            lambda test: judge_logits(model.weights, test.without_lr(), with_probe=False),
            fit_regression(train, with_probe=False),
            fit_regression(train, with_probe=True),
        ]

    def published(train: Examples) -> list[Callable[[Examples], Tensor]]:
        return [fit_reference(data.recordings, train, **_REFERENCE[quick], seed=seed)]

    scores = held_out_scores(examples, fitted, [WEIGHTS, PROBE, BLIND, REGRESSION, REGRESSION_PROBE], workers=workers)
    middle = _one_spacing(examples)
    few = held_out_scores(examples.where(middle), published, [PUBLISHED], progress="the published form, one left out", workers=workers)
    scores[PUBLISHED] = {}
    for axis, part in few[PUBLISHED].items():
        scores[PUBLISHED][axis] = torch.full((len(examples),), torch.nan)
        scores[PUBLISHED][axis][middle] = part
    return scores


def _one_spacing(examples: Examples) -> Tensor:
    """Select every second window of each run's second smallest spacing: (m,) bool.

    The published form would take an hour on all windows.
    """
    keep = torch.zeros(len(examples), dtype=torch.bool)
    for run in range(len(examples.runs)):
        here = examples.run == run
        spacings = examples.spacing[here].unique()
        if len(spacings):
            keep |= here & (examples.spacing == spacings[min(1, len(spacings) - 1)])
    return keep & (examples.stage % 2 == 0)


def _cpu_seconds() -> float:
    """Return the processor seconds of this process and its finished workers."""
    return sum(os.times()[:4])


def _at(threshold: float, score: Tensor, examples: Examples) -> dict[str, float | None]:
    """Return precision and recall of probabilities (m,) at a threshold, with the same weight for every run."""
    there = ~score.isnan()
    weight, called, label = examples.weight[there].double(), score[there] >= threshold, examples.label[there]
    hit, all_called, all_true = (float(weight[x].sum()) for x in (called & label, called, label))
    return {"precision": hit / all_called if all_called else None, "recall": hit / all_true if all_true else None}


def _behind_frozen(scores: dict[str, Tensor], examples: Examples) -> dict[str, Any]:
    """Compare windows behind a frozen layer with those of runs without freezes."""
    behind = examples.behind_frozen
    parts = {"behind frozen layers": behind, "runs without freezes": ~examples.having("freezes", True)}
    out: dict[str, Any] = {"windows": {part: int(mask.sum()) for part, mask in parts.items()}}
    for name, score in scores.items():
        out[name] = {}
        for part, mask in parts.items():
            there = mask & ~score.isnan()
            figures = evaluate(score.where(mask, torch.full((), torch.nan)), examples, "net")
            rows = [row for row in figures.values() if row["auc"] is not None]
            out[name][part] = {
                "auc": sum(float(row["auc"] or 0) for row in rows) / len(rows) if rows else None,
                "windows": int(there.sum()),
            }
    return out


def _truth(logits: dict[str, Tensor], examples: Examples, data: Dataset, settings: LabelSettings) -> dict[str, Any]:
    if not data.branches:
        return {}
    index = branch_examples(examples, data.branches)
    nothing = torch.full((len(index),), torch.nan, dtype=torch.float64)

    def at(score: Tensor) -> Tensor:
        return torch.where(index >= 0, score[index.clamp_min(0)].double(), nothing)

    scores = {"label: settled CKA with the end (needs the future)": branch_similarity(data.recordings, data.branches, settings)}
    scores |= {name: at(score) for name, score in logits.items()}
    scores |= {name: at(examples.prefix_minimum(score)) for name, score in rules(examples).items()}
    return against_truth(scores, data.branches)


def _branch_facts(branches: list[Branch]) -> dict[str, Any]:
    if not branches:
        return {"count": 0}
    cost = torch.tensor([b.cost for b in branches], dtype=torch.float64)
    return {
        "count": len(branches),
        "runs": len({b.run for b in branches}),
        "harmless": float((cost < 0.01).double().mean()),
        "harmless_loss": sum(b.loss_cost < 0.05 for b in branches) / len(branches),
        "mean_cost": float(cost.mean()),
        "worst_cost": float(cost.max()),
        "control_noise": sum(b.noise for b in branches) / len(branches),
    }


def _accuracies(data: Dataset) -> dict[str, float]:
    """Return the mean held-out accuracy, 0..1, of the small networks by network, data set and regime."""
    groups: dict[str, list[float]] = {}
    for r in data.recordings:
        groups.setdefault(" ".join(str(r.tags.get(key, "")) for key in ("net", "data", "regime")).strip(), []).append(r.metric)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}
