"""Evaluate a predictor on recordings, and choose the threshold for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.predictor.model import DEFAULT_PREDICTOR, FreezePredictor, load_predictor, predictor_notes, save_predictor
from smartfrz_ds.predictor.recording.collect import one_thread, read_dataset

from .counterfactual_eval import against_truth, branch_examples
from .dataset import Examples, make_examples
from .evaluate import PRECISION_TARGET, auc, auc_in_time, balancing_threshold, calibration_error, choose_threshold, reliability
from .fit import score
from .labelling import labels_of


def evaluate_predictor(folder: Path, predictor: Path | None = None) -> dict[str, Any]:
    """Evaluate a predictor on a data set, separately for its judges.

    On runs that the predictor was trained on, these are training figures.

    Args:
        folder: The data set.
        predictor: A file; None: the shipped one.

    Returns:
        "judges": for "weights alone", and "with the probe" if the recordings have one, "windows", "positive_share",
        "auc", "auc_in_time", "threshold", "precision", "recall", "balanced_accuracy" at the file's threshold,
        "best_balanced_accuracy" at the best threshold for this data, "calibration_error", "reliability" and "runs",
        the AUC of each run. "truth": figures against the branches, if there are any.

    Raises:
        ValueError: The folder or the file cannot be used.
    """
    return _look(folder, load_predictor(predictor))[0]


def _look(folder: Path, model: FreezePredictor) -> tuple[dict[str, Any], Examples, dict[str, Tensor]]:
    """Return the figures of `evaluate_predictor`, the examples, and the probabilities (m,) of each judge, NaN if it cannot judge."""
    data, settings = read_dataset(folder), labels_of(folder)
    with one_thread():
        examples = make_examples(data.recordings, model.config.window, settings)
        scores = {"weights alone": score(model, examples.without_probe())}
        if bool(examples.probed.any()):
            scores["with the probe"] = score(model, examples).where(examples.probed, torch.full((), torch.nan))
    figures: dict[str, Any] = {"recordings": len(data.recordings), "judges": {}}
    for name, value in scores.items():
        figures["judges"][name] = _figures(value, examples, model.threshold)
    if data.branches:
        index = branch_examples(examples, data.branches)
        nothing = torch.full((len(index),), torch.nan)
        at = {name: torch.where(index >= 0, value[index.clamp_min(0)], nothing) for name, value in scores.items()}
        figures["truth"] = against_truth(at, data.branches)
    return figures, examples, scores


def calibrate(
    folder: Path, *, out: Path | None = None, predictor: Path | None = None, precision: float = PRECISION_TARGET, plot: Path | None = None
) -> dict[str, Any]:
    """Find the threshold at which a predictor has the given precision on the recordings in `folder`.

    Args:
        folder: The data set.
        out: A .safetensors file for the same predictor with that threshold; None: write nothing.
        predictor: A file; None: the shipped one.
        precision: Target precision, in (0.5, 1).
        plot: A .png file for the reliability diagram (requires matplotlib).

    Returns:
        "threshold" of the judge on weights alone (the other judge is shifted so that it means the same), "reached"
        (the precision on these recordings; None if no threshold reaches the target, in which case the threshold is
        0.99), and the figures of `evaluate_predictor`.

    Raises:
        ValueError: A value is out of range, or the folder or the file cannot be used.
        ImportError: matplotlib is missing.
    """
    if not 0.5 < precision < 1.0:
        raise ValueError(f"precision: got {precision}; allowed: a number in (0.5, 1)")
    for name, path, suffix in (("out", out, ".safetensors"), ("plot", plot, ".png")):
        if path is not None and path.suffix != suffix:
            raise ValueError(f"{name}: got {str(path)!r}; allowed: a path that ends in {suffix}")
    model = load_predictor(predictor)
    found, examples, scores = _look(folder, model)
    chosen = {name: choose_threshold(value, examples.label, examples.weight, precision) for name, value in scores.items()}
    threshold = chosen["weights alone"][0]
    figures: dict[str, Any] = {
        "precision_target": precision,
        "threshold": threshold,
        "reached": {name: reached for name, (_, reached) in chosen.items()},
        **found,
    }
    if plot is not None:
        draw_reliability({name: row["reliability"] for name, row in figures["judges"].items()}, threshold, plot)
    if out is not None:
        notes = predictor_notes(DEFAULT_PREDICTOR if predictor is None else predictor)
        model.set_thresholds(threshold, chosen["with the probe"][0] if "with the probe" in chosen else None)
        kept = {key: figures[key] for key in ("precision_target", "threshold", "reached", "recordings")}
        save_predictor(model, out, notes={**notes, "calibrated": kept})
    return figures


def draw_reliability(tables: dict[str, list[dict[str, float]]], threshold: float, path: Path) -> None:
    """Draw reliability diagrams: predicted probability against the share that has converged.

    Args:
        tables: Tables of `evaluate.reliability`, by name.
        threshold: Threshold to mark.
        path: A .png file.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the reliability diagram requires matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for name, table in tables.items():
        axes.plot([r["predicted"] for r in table], [r["converged"] for r in table], marker="o", markersize=3, linewidth=1, label=name)
    axes.axvline(threshold, color="0.5", linestyle=":", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="share converged", aspect="equal")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _figures(value: Tensor, examples: Examples, threshold: float) -> dict[str, Any]:
    there = ~value.isnan()
    s, label, weight, time = value[there], examples.label[there], examples.weight[there].double(), examples.time[there]
    table = reliability(s, label, weight)
    called, balanced = s >= threshold, s >= balancing_threshold(s, label, weight)

    def share(hit: Tensor, of: Tensor) -> float | None:
        whole = float(weight[of].sum())
        return float(weight[of & hit].sum()) / whole if whole > 0 else None

    def accuracy(positive: Tensor) -> float | None:
        recall, specificity = share(positive, label), share(~positive, ~label)
        return None if recall is None or specificity is None else (recall + specificity) / 2

    runs = {}
    for i, run in enumerate(examples.runs):
        here = there & (examples.run == i)
        runs[str(run["name"])] = auc(value[here], examples.label[here])
    return {
        "windows": len(s),
        "positive_share": float(label.double().mean()),
        "auc": auc(s, label),
        "auc_in_time": auc_in_time(s, label, time),
        "threshold": threshold,
        "precision": share(label, called),
        "recall": share(called, label),
        "balanced_accuracy": accuracy(called),
        "best_balanced_accuracy": accuracy(balanced),
        "calibration_error": calibration_error(table),
        "reliability": table,
        "runs": runs,
    }
