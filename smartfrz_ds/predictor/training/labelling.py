"""Labels of a whole data set on disk, and their sensitivity to their constants."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smartfrz_ds.predictor.constants import RULES
from smartfrz_ds.predictor.recorder import Recording
from smartfrz_ds.predictor.recording.branches import HARMLESS, Branch
from smartfrz_ds.predictor.recording.collect import Dataset, read_dataset
from smartfrz_ds.predictor.recording.labels import LabelSettings, at_steps, similarity_of

from .evaluate import auc

LABELS_VERSION = 1
_SIMILARITIES = (0.90, 0.95, 0.97, 0.98, 0.99, 0.995)


def label_dataset(folder: Path, settings: LabelSettings | None = None) -> dict[str, Any]:
    """Label every recording of the data set in `folder`: write labels.safetensors and labels.json.

    labels.safetensors contains, for each run NAME, "NAME.similarity", (evaluations, layers) fp32, the value that the
    rule compares, and "NAME.converged", bool. labels.json contains the settings, the share of positive labels, and
    "sensitivity" (`sensitivity_of`).

    Args:
        folder: The data set.
        settings: The label settings; None: the defaults.

    Returns:
        The content of labels.json.

    Raises:
        ValueError: As in `read_dataset`.
    """
    settings = settings or LabelSettings()
    data = read_dataset(folder)
    tensors = {}
    for recording in data.recordings:
        value = similarity_of(recording.cka, recording.kinds, settings)
        tensors[f"{recording.name}.similarity"] = value.float()
        tensors[f"{recording.name}.converged"] = value >= settings.similarity
    positive = sum(float(t.double().mean()) for name, t in tensors.items() if name.endswith(".converged")) / len(data.recordings)
    result = {
        "version": LABELS_VERSION,
        "settings": asdict(settings),
        "runs": len(data.recordings),
        "positive_share": positive,
        "sensitivity": sensitivity_of(data, settings),
    }
    partial = folder / "labels.safetensors.partial"
    save_file(tensors, partial)
    os.replace(partial, folder / "labels.safetensors")
    (folder / "labels.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def labels_of(folder: Path) -> LabelSettings:
    """Return the settings with which a data set was labelled; the defaults if it was not.

    Raises:
        ValueError: labels.json is not valid.
    """
    file = folder / "labels.json"
    if not file.is_file():
        return LabelSettings()
    try:
        return LabelSettings(**json.loads(file.read_text())["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no valid label settings ({error}); allowed: a file written by `smartfrz label`") from error


def sensitivity_of(data: Dataset, settings: LabelSettings) -> list[dict[str, Any]]:
    """Compute how the labels depend on their constants: other similarities with the same rule, then other rules.

    Args:
        data: The data set.
        settings: The reference label settings.

    Returns:
        Rows with the settings; "positive_share" of all labels, runs weighted equally; "agreement", share equal to the
        labels of `settings`; and against the counterfactual branches, if any: "fires", share of branches whose label
        is true; "harmless", share of those that cost less than a point; "mean_cost" and "worst_cost" of those in
        accuracy, 0..1; "mean_loss_cost" of those, relative; "auc" of the compared similarity against "harmless". None
        if undefined.
    """
    rows = [replace(settings, similarity=s) for s in sorted({*_SIMILARITIES, settings.similarity})]
    rows += [replace(settings, rule=rule) for rule in RULES if rule != settings.rule]
    if settings.tie_embeddings:
        rows.append(replace(settings, tie_embeddings=False))
    base = [_labels(r, settings) for r in data.recordings]
    table = []
    for other in rows:
        labels = [_labels(r, other) for r in data.recordings]
        table.append(
            {
                **asdict(other),
                "positive_share": _mean([float(x.double().mean()) for x in labels]),
                "agreement": _mean([float((x == y).double().mean()) for x, y in zip(labels, base, strict=True)]),
                **_against_truth(data.recordings, data.branches, other),
            }
        )
    return table


def branch_similarity(recordings: Sequence[Recording], branches: Sequence[Branch], settings: LabelSettings) -> torch.Tensor:
    """Return the value that the rule compares, for the last layer of each branch's prefix when it was frozen.

    Returns:
        (branches,) fp64, NaN without a recording.
    """
    by_name = {r.name: r for r in recordings}
    values = []
    for b in branches:
        r = by_name.get(b.run)
        values.append(
            float("nan")
            if r is None
            else float(at_steps(similarity_of(r.cka, r.kinds, settings), r.cka_steps, torch.tensor([b.step]))[0, b.frozen - 1])
        )
    return torch.tensor(values, dtype=torch.float64)


def _labels(recording: Recording, settings: LabelSettings) -> torch.Tensor:
    return similarity_of(recording.cka, recording.kinds, settings) >= settings.similarity


def _against_truth(recordings: Sequence[Recording], branches: Sequence[Branch], settings: LabelSettings) -> dict[str, float | None]:
    value = branch_similarity(recordings, branches, settings)
    there = ~value.isnan()
    cost = torch.tensor([b.cost for b in branches], dtype=torch.float64)[there]
    loss_cost = torch.tensor([b.loss_cost for b in branches], dtype=torch.float64)[there]
    value = value[there]
    called = value >= settings.similarity
    some = bool(called.any())
    return {
        "fires": float(called.double().mean()) if len(value) else None,
        "harmless": float((cost[called] < HARMLESS).double().mean()) if some else None,
        "mean_cost": float(cost[called].mean()) if some else None,
        "worst_cost": float(cost[called].max()) if some else None,
        "mean_loss_cost": float(loss_cost[called].mean()) if some else None,
        "auc": auc(value, cost < HARMLESS) if len(value) else None,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
