"""Evaluate scores against counterfactual branches: does a high score mean that freezing this prefix now costs less than a point?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.predictor.recording.branches import HARMLESS, Branch

from .dataset import Examples
from .evaluate import auc

HARMLESS_LOSS = 0.05
"""A branch is harmless in loss if its loss exceeds the controls' by less than 5 %."""

CLEARLY_HARMLESS, CLEARLY_HARMFUL = 0.005, 0.02
"""Costs in accuracy between these two are within the noise of the controls around one point."""

_DRAWS = 400


def branch_examples(examples: Examples, branches: Sequence[Branch]) -> Tensor:
    """Find the example by which a predictor would have judged each branch's prefix.

    This is the last layer of the prefix at the step of the freeze, at the smallest spacing with probe features,
    otherwise at the smallest spacing.

    Returns:
        (branches,) int64, -1 if there is no example.
    """
    names = [str(run["name"]) for run in examples.runs]
    found: dict[tuple[str, int, int], tuple[bool, int, int]] = {}
    steps = torch.tensor(sorted({b.step for b in branches}), dtype=torch.int64)
    probed = examples.probed
    for i in torch.nonzero(torch.isin(examples.step, steps))[:, 0].tolist():
        key = (names[int(examples.run[i])], int(examples.step[i]), int(examples.layer[i]))
        rank = (not bool(probed[i]), int(examples.spacing[i]), i)
        if key not in found or rank < found[key]:
            found[key] = rank
    return torch.tensor([found.get((b.run, b.step, b.frozen - 1), (False, 0, -1))[2] for b in branches], dtype=torch.int64)


def against_truth(scores: Mapping[str, Tensor], branches: Sequence[Branch]) -> dict[str, dict[str, Any]]:
    """Evaluate scores against the branches.

    Args:
        scores: Scores (branches,) by name, higher is more converged, NaN if unknown.
        branches: The branches.

    Returns:
        For each score: "auc" against "costs less than a point of accuracy" with its 95 % interval "low" to "high"
            over draws of whole runs; "auc_loss" against "costs less than 5 % of loss"; "branches", their number;
            "within_kind", the mean AUC within one network kind; "auc_decay", without runs of constant learning rate,
            whose end is noisy; "auc_clear", without costs between half a point and two.
    """
    cost = torch.tensor([b.cost for b in branches], dtype=torch.float64)
    loss_cost = torch.tensor([b.loss_cost for b in branches], dtype=torch.float64)
    run_names = sorted({b.run for b in branches})
    of_run = torch.tensor([run_names.index(b.run) for b in branches], dtype=torch.int64)
    kinds = [b.run.split("-")[0] for b in branches]
    decays = torch.tensor(["-constant-" not in b.run for b in branches], dtype=torch.bool)
    clear = (cost < CLEARLY_HARMLESS) | (cost > CLEARLY_HARMFUL)
    table = {}
    for name, score in scores.items():
        there = ~score.isnan()
        value, harmless = score[there].double(), (cost < HARMLESS)[there]
        draws = _draws(value, harmless, of_run[there], len(run_names))
        inside = [
            auc(score[there & mask].double(), (cost < HARMLESS)[there & mask])
            for kind in sorted(set(kinds))
            for mask in [torch.tensor([k == kind for k in kinds])]
        ]
        known = [x for x in inside if x is not None]
        table[name] = {
            "auc": auc(value, harmless),
            "low": draws[int(0.025 * len(draws))] if draws else None,
            "high": draws[int(0.975 * len(draws))] if draws else None,
            "auc_loss": auc(value, (loss_cost < HARMLESS_LOSS)[there]),
            "auc_decay": auc(score[there & decays].double(), (cost < HARMLESS)[there & decays]),
            "auc_clear": auc(score[there & clear].double(), (cost < HARMLESS)[there & clear]),
            "within_kind": sum(known) / len(known) if known else None,
            "branches": int(there.sum()),
        }
    return table


def _draws(score: Tensor, label: Tensor, run: Tensor, runs: int) -> list[float]:
    """Return sorted AUCs over draws of whole runs with replacement, because branches of one run are not independent."""
    generator = torch.Generator().manual_seed(0)
    members = [torch.nonzero(run == i)[:, 0] for i in range(runs)]
    values = []
    for _ in range(_DRAWS):
        index = torch.cat([members[i] for i in torch.randint(runs, (runs,), generator=generator).tolist()])
        value = auc(score[index], label[index])
        if value is not None:
            values.append(value)
    return sorted(values)
