"""Card of a data set of recorded runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartfrz_ds.predictor.constants import CONVERGED

if TYPE_CHECKING:
    from .collect import Dataset


def dataset_card(data: Dataset, *, seed: int, quick: bool) -> str:
    """Return the README.md of a data set created by `smartfrz collect`.

    Args:
        data: The data set.
        seed: Its `--seed`.
        quick: Whether it was collected with `--quick`.
    """
    nets = sorted({str(r.tags.get("net")) for r in data.recordings})
    freezes = sum(bool(r.tags.get("freezes")) for r in data.recordings)
    lines = [
        "# Recordings for training a freezing predictor",
        "",
        f"Created by `smartfrz collect --out DIR --seed {seed}{' --quick' if quick else ''}`: {len(data.recordings)} training runs",
        f"({', '.join(nets)}; {freezes} of them with freezes) and {len(data.branches)} counterfactual branches, which took",
        f"{data.cpu_seconds / 60:.1f} minutes on one core. Contains sampled weights, similarities and figures, but no texts or images.",
        "",
        "- `dataset.json`: versions, seed and names of the runs.",
        "- `runs/NAME.safetensors`: `weights` (layers, snapshots, 256) fp32, sampled at fixed positions; `steps`, `lr_spent` of the",
        "  snapshots; `cka_pairs` (evaluations, evaluations, layers), linear CKA of each layer between two steps on 128 held-out inputs;",
        "  `cka_steps`; `frozen_at` of each layer, -1 for never. Everything else is in the metadata, as JSON.",
        "- `branches/NAME.json`: the final cost of freezing a prefix at a step, compared with two unfrozen controls.",
        "- `labels.safetensors`, `labels.json` (from `smartfrz label`): by default, converged means a settled prefix similarity to the",
        f"  end of at least {CONVERGED}.",
        "",
        "| run | steps | accuracy | frozen layers |",
        "| --- | --- | --- | --- |",
    ]
    for r in data.recordings:
        lines.append(_row(r.name, str(r.total_steps), f"{r.metric:.3f}", str(int((r.frozen_at >= 0).sum()))))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
