"""Contribution of each part of the predictor on unseen network kinds, and the effect of patience and cooldown in a replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.predictor.features import SCALAR_FEATURES
from smartfrz_ds.predictor.model import PredictorConfig
from smartfrz_ds.predictor.recorder import Recording
from smartfrz_ds.predictor.recording.collect import Dataset, one_thread
from smartfrz_ds.predictor.recording.labels import LabelSettings, at_steps, similarity_of

from .dataset import Examples, make_examples
from .evaluate import evaluate, mean, worst
from .fit import AXES, calibrated_apart, fit, held_out_scores, judge_logits
from .logistic_baseline import fit_regression

_AXIS = "network kind"
_SPACING = (2,)  # every second recorded snapshot; in long runs every fourth
_FEATURES = {
    "without the prefix": ("log_prefix_drift", "log_prefix_ratio", "log_prefix_future", "log_prefix_future_share"),
    "without the ratio to the first window": ("log_ratio", "log_prefix_ratio"),
    "without the drift to come": ("log_future", "log_prefix_future", "log_future_share", "log_prefix_future_share"),
    "without the learning rate to come": (
        "log_lr_remaining",
        "lr_remaining_known",
        "log_future",
        "log_prefix_future",
        "log_future_share",
        "log_prefix_future_share",
    ),
    "without what freezes took away": ("log_held_drift", "log_held_future"),
}


def ablations(data: Dataset, seed: int, settings: LabelSettings | None = None) -> list[dict[str, Any]]:
    """Measure the predictor without some of its parts.

    The first two rows are the judges, fitted again. All others are logistic regressions on the scalars, the judges'
    linear part, which is within a point of them and takes seconds; compare them with the third row. One spacing of
    each run is used, so that the figures differ from the card's.

    Args:
        data: Recorded runs.
        seed: Seed of the fits.
        settings: The label settings; None: the defaults.

    Returns:
        Rows of "part", "change" and, over the left-out network kinds, "auc", "worst_auc", "auc_in_time",
        "balanced_accuracy".
    """
    settings = settings or LabelSettings()
    config = PredictorConfig()
    with one_thread():
        examples = make_examples(data.recordings, config.window, settings)
        rows = [_row("attention", "with it, weights alone", examples, _weights(config, seed))]
        rows.append(_row("attention", "with it, and the probe", examples, _probe(config, seed)))
        rows.append(_row("attention", "without it: regression on the scalars", examples, _regression))
        for change, columns in _FEATURES.items():
            rows.append(_row("features", change, _without(examples, columns), _regression))
        for window in (10, 20):
            shorter = make_examples(data.recordings, window, settings, _SPACING)
            rows.append(_row("window", f"{window} snapshots", shorter, _regression))
        for size in (16, 64):
            fewer = [replace(r, weights=r.weights[:, :, :: r.weights.shape[2] // size]) for r in data.recordings]
            smaller = make_examples(fewer, config.window, settings, _SPACING)
            rows.append(_row("sample", f"{size} weights a layer", smaller, _regression))
        redrawn = make_examples([_redrawn(r, seed) for r in data.recordings], config.window, settings, _SPACING)
        rows.append(_row("sample", "indices re-drawn at each snapshot", redrawn, _regression))
    return rows


def replay(data: Dataset, thresholds: Sequence[float], settings: LabelSettings | None = None) -> list[dict[str, Any]]:
    """Replay patience and cooldown on the recorded runs without freezes.

    Each run is judged by a regression on the scalars that never saw its network kind. A freeze changes nothing in a
    recording, so this shows which layers are chosen, not the consequences.

    Args:
        data: Recorded runs.
        thresholds: Thresholds to try.
        settings: The label settings; None: the defaults.

    Returns:
        Rows of "patience", "cooldown" (stages), "order" (front_to_back or any), "threshold"; "runs" that froze
        anything; "saved": mean over all runs of the frozen share of (block, step); "right": share of the frozen
        blocks that had converged by the label when they froze; "similarity": their lowest settled similarity, mean
        over runs.
    """
    settings = settings or LabelSettings()
    config = PredictorConfig()
    with one_thread():
        examples = make_examples(data.recordings, config.window, settings, _SPACING)
        score = _held_out(examples, _regression)
    score = calibrated_apart(score, examples, AXES[_AXIS])
    rows = []
    for threshold in thresholds:
        for order in ("front_to_back", "any"):
            for patience, cooldown in ((1, 0), (2, 0), (3, 0), (1, 6), (2, 6), (3, 6)):
                found = [_frozen(r, i, examples, score, threshold, patience, cooldown, order) for i, r in enumerate(data.recordings)]
                free = [(r, frozen) for r, frozen in zip(data.recordings, found, strict=True) if not bool((r.frozen_at >= 0).any())]
                rows.append(
                    {"patience": patience, "cooldown": cooldown, "order": order, "threshold": threshold, **_outcome(free, settings)}
                )
    return rows


def ablation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `ablations` as Markdown."""
    lines = ["| part | what is changed | AUC | worst | AUC in time | balanced accuracy |", "| --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        numbers = " | ".join("-" if r[k] is None else f"{r[k]:.3f}" for k in ("auc", "worst_auc", "auc_in_time", "balanced_accuracy"))
        lines.append(f"| {r['part']} | {r['change']} | {numbers} |")
    return "\n".join(lines)


def replay_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `replay` as Markdown."""
    heads = ("threshold", "order", "patience", "cool-down", "runs that froze", "still share", "right", "lowest similarity")
    lines = [f"| {' | '.join(heads)} |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for r in rows:
        numbers = " | ".join("-" if r[k] is None else f"{r[k]:.3f}" for k in ("saved", "right", "similarity"))
        lines.append(f"| {r['threshold']:.3f} | {r['order']} | {r['patience']} | {r['cooldown']} | {r['runs']} of {r['of']} | {numbers} |")
    return "\n".join(lines)


Fitter = Callable[[Examples], Callable[[Examples], Tensor]]


def _weights(config: PredictorConfig, seed: int) -> Fitter:
    def fitted(train: Examples) -> Callable[[Examples], Tensor]:
        model = fit(train.without_probe(), config, seed)
        return lambda test: judge_logits(model.weights, test, with_probe=False)

    return fitted


def _probe(config: PredictorConfig, seed: int) -> Fitter:
    def fitted(train: Examples) -> Callable[[Examples], Tensor]:
        model = fit(train, config, seed)
        return lambda test: judge_logits(model.probe, test, with_probe=True)

    return fitted


def _regression(train: Examples) -> Callable[[Examples], Tensor]:
    return fit_regression(train, with_probe=False)


def _held_out(examples: Examples, make: Fitter) -> Tensor:
    return held_out_scores(examples, lambda train: [make(train)], ["it"], [_AXIS])["it"][_AXIS]


def _row(part: str, change: str, examples: Examples, make: Fitter) -> dict[str, Any]:
    figures = evaluate(_held_out(examples, make), examples, AXES[_AXIS], probability=False)
    return {
        "part": part,
        "change": change,
        "auc": mean(figures, "auc"),
        "worst_auc": worst(figures, "auc"),
        "auc_in_time": mean(figures, "auc_in_time"),
        "balanced_accuracy": mean(figures, "balanced_accuracy"),
    }


def _without(examples: Examples, columns: Sequence[str]) -> Examples:
    scalars, blind = examples.scalars.clone(), examples.scalars_without_lr.clone()
    index = [SCALAR_FEATURES.index(name) for name in columns]
    scalars[:, index], blind[:, index] = 0.0, 0.0
    return replace(examples, scalars=scalars, scalars_without_lr=blind)


def _redrawn(recording: Recording, seed: int) -> Recording:
    """Draw a quarter of the weights again at every snapshot, as the public re-implementation does."""
    layers, snapshots, size = recording.weights.shape
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(layers, snapshots, size, generator=generator).argsort(2)[:, :, : size // 4]
    return replace(recording, weights=recording.weights.gather(2, index))


def _frozen(
    recording: Recording, run: int, examples: Examples, score: Tensor, threshold: float, patience: int, cooldown: int, order: str
) -> dict[int, int]:
    """Return block -> step at which it freezes, at the run's second smallest spacing."""
    here = torch.nonzero(examples.run == run)[:, 0]
    spacings = examples.spacing[here].unique()
    if not len(spacings):
        return {}
    here = here[examples.spacing[here] == spacings[min(1, len(spacings) - 1)]]
    blocks = [i for i, kind in enumerate(recording.kinds) if kind == "block"]
    streak = dict.fromkeys(blocks, 0)
    frozen: dict[int, int] = {}
    wait = 0
    for stage in examples.stage[here].unique().tolist():
        rows = here[examples.stage[here] == stage]
        step = int(examples.step[rows[0]])
        for i in rows.tolist():
            block = int(examples.layer[i])
            streak[block] = streak[block] + 1 if float(score[i]) >= threshold else 0
        if wait > 0:
            wait -= 1
            continue
        for block in blocks:
            if block in frozen:
                continue
            if streak[block] >= patience:
                frozen[block] = step
                wait = cooldown
            elif order == "front_to_back":
                break
    return frozen


def _outcome(runs: Sequence[tuple[Recording, dict[int, int]]], settings: LabelSettings) -> dict[str, Any]:
    saved, right, lowest, fired = [], [], [], 0
    for recording, frozen in runs:
        blocks = sum(kind == "block" for kind in recording.kinds)
        saved.append(sum(1 - step / recording.total_steps for step in frozen.values()) / blocks)
        if not frozen:
            continue
        fired += 1
        similarity = similarity_of(recording.cka, recording.kinds, settings)
        values = [float(at_steps(similarity, recording.cka_steps, torch.tensor([step]))[0, block]) for block, step in frozen.items()]
        right += [v >= settings.similarity for v in values]
        lowest.append(min(values))
    return {
        "runs": fired,
        "of": len(runs),
        "saved": sum(saved) / len(saved) if saved else None,
        "right": sum(right) / len(right) if right else None,
        "similarity": sum(lowest) / len(lowest) if lowest else None,
    }
