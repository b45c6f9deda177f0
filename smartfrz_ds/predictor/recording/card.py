"""The card of a data set of recorded runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartfrz_ds.predictor.constants import CONVERGED

if TYPE_CHECKING:
    from .collect import Dataset


def dataset_card(data: Dataset, *, seed: int, quick: bool) -> str:
    """The README.md of a data set that `smartfrz collect` made."""
    nets = sorted({str(r.tags.get("net")) for r in data.recordings})
    freezes = sum(bool(r.tags.get("freezes")) for r in data.recordings)
    lines = [
        "# Recordings for a freezing predictor",
        "",
        f"`smartfrz collect --out DIR --seed {seed}{' --quick' if quick else ''}` made this folder: {len(data.recordings)} training runs",
        f"({', '.join(nets)}; {freezes} of them with freezes on the way) and {len(data.branches)} counterfactual branches,",
        f"{data.cpu_seconds / 60:.1f} minutes of one core. It holds sampled weights, similarities and figures; nobody's text or image.",
        "",
        "- `dataset.json`: versions, seed, names of the runs.",
        "- `runs/NAME.safetensors`: `weights` (layers, snapshots, 256) fp32, sampled at fixed places; `steps`, `lr_spent` of the",
        "  snapshots; `cka_pairs` (evaluations, evaluations, layers), linear CKA of each layer between two moments on 128 held-out inputs;",
        "  `cka_steps`; `frozen_at` of each layer, -1 for never. The rest stands in the metadata, as JSON.",
        "- `branches/NAME.json`: what freezing a prefix at a step cost at the end, against two unfrozen controls.",
        "- `labels.safetensors`, `labels.json` (by `smartfrz label`): by default converged is a settled prefix similarity of",
        f"  {CONVERGED} to the end.",
        "",
        "| run | steps | accuracy | frozen layers |",
        "| --- | --- | --- | --- |",
    ]
    for r in data.recordings:
        lines.append(_row(r.name, str(r.total_steps), f"{r.metric:.3f}", str(int((r.frozen_at >= 0).sum()))))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
