"""Is the cost of freezing better predicted by the loss curve than by the predictor? Tables over branches and matched runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.predictor.loss_curve import fit_loss_curve

from .counterfactual_eval import HARMLESS_LOSS
from .evaluate import auc

_BACKWARD = 2 / 3  # share of a layer's FLOPs that a frozen prefix saves
_RATIOS = [x / 4 for x in range(-24, 25)]  # log ratios of both costs that are tried as a threshold


def cost_rows(held: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make a row for each branch from the results of `collect_costs`.

    Returns:
        "kind": of the network; "cost", "matched": relative increase of the held-out loss of the branch and, between matched
        runs, of the same saving by fewer steps; "p": 0 if unknown; "share": frozen; "left": learning rate left, as a share;
        "curve", "shorter": what the fitted curve still falls, and what it rises with fewer steps.
    """
    rows = []
    for run in held:
        full, lr, points = sum(run["full"]) / len(run["full"]), run["lr"], len(run["lr"])
        steps, total = run["run"]["steps"], sum(lr)
        ends = torch.tensor(lr, dtype=torch.float64).cumsum(0).tolist()
        middle = [end - x / 2 for end, x in zip(ends, lr, strict=True)]
        known = [(0.0, 0.0), *sorted((x["share"], x["loss"] / full - 1) for x in run["matched"])]
        for branch in run["branches"]:
            n = round(branch["step"] / steps * points)
            curve = fit_loss_curve(middle[:n], run["losses"][:n])
            if curve is None:
                continue
            share, end = branch["frozen"] / branch["of"], max(curve.at(total), 1e-12)
            saved = _BACKWARD * share * (1 - branch["step"] / steps)
            rows.append(
                {
                    "kind": run["run"]["net"],
                    "cost": branch["loss"] / full - 1,
                    "matched": _between(known, saved),
                    "p": max(branch["p"], 0.0),
                    "share": share,
                    "left": 1 - ends[n - 1] / total,
                    "curve": curve.at(ends[n - 1]) / end - 1,
                    "shorter": curve.at(total * (1 - saved)) / end - 1,
                }
            )
    return rows


def cost_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Compare scores as a Markdown table, and say what a threshold on both predicted costs is worth on kinds left out.

    Args:
        rows: From `cost_rows`, of two kinds or more.
    """
    column = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0] if key != "kind"}
    kinds = [row["kind"] for row in rows]
    lost, cost = column["curve"] * column["share"], column["cost"]
    inputs = [_log(lost), _log(1 - column["p"]), _log(column["left"]), column["share"]]
    scores = {
        "predictor alone, 1 − p": 1 - column["p"],
        "learning rate left × share frozen": column["left"] * column["share"],
        "loss curve: remaining fall × share frozen": lost,
        "loss curve × (1 − p)": lost * (1 - column["p"]),
        "regression on all four, kinds left out": _left_out(torch.stack(inputs, 1), cost, kinds),
    }
    lines = ["| score | AUC, costs less than 5 % of loss | within one kind | rank correlation with the cost |", "| --- | --- | --- | --- |"]
    for name, score in scores.items():
        inside = [_auc(score[mask], cost[mask]) for mask in _masks(kinds).values()]
        there = [x for x in inside if x is not None]
        whole = _auc(score, cost)
        lines.append(f"| {name} | {_text(whole)} | {_text(sum(there) / len(there) if there else None)} | {_ranks(score, cost):.3f} |")
    ratio = _log(lost * (1 - column["p"])) - _log(column["shorter"])
    gated = torch.zeros_like(cost)
    for mask in _masks(kinds).values():
        limit = min(_RATIOS, key=lambda x: float(torch.where(ratio < x, cost, column["matched"])[~mask].mean()))
        gated[mask] = torch.where(ratio < limit, cost, column["matched"])[mask]
    means = {
        "always freeze": cost, "always fewer steps": column["matched"], "choose by both predicted costs, kinds left out": gated,
        "choose with hindsight": torch.minimum(cost, column["matched"]),
    }  # fmt: skip
    dearer = cost > column["matched"]
    said = f"Freezing costs more than fewer steps in {float(dearer.double().mean()):.0%} of {len(rows)} branches; the ratio of both"
    said += f" predicted costs tells which with an AUC of {_text(auc(ratio, dearer))}."
    lines += ["", said, "", "| decision | mean increase of the loss |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {float(values.mean()):+.3f} |" for name, values in means.items())])


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate linearly; beyond the last point, along the last line."""
    i = next((i for i in range(1, len(points)) if x <= points[i][0]), len(points) - 1)
    (a, b), (c, d) = points[i - 1], points[i]
    return b + (d - b) * (x - a) / (c - a)


def _left_out(x: Tensor, cost: Tensor, kinds: Sequence[str]) -> Tensor:
    """Predict each kind's costs by least squares on the other kinds. Costs beyond ±50 % count as that."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    found = torch.zeros(len(x), dtype=torch.float64)
    for mask in _masks(kinds).values():
        rest = x[~mask]
        ridge = 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(rest.T @ rest + ridge, rest.T @ cost[~mask].clamp(-0.5, 0.5))
        found[mask] = x[mask] @ weights
    return found


def _masks(kinds: Sequence[str]) -> dict[str, Tensor]:
    return {kind: torch.tensor([k == kind for k in kinds]) for kind in sorted(set(kinds))}


def _auc(score: Tensor, cost: Tensor) -> float | None:
    return auc(-score, cost < HARMLESS_LOSS)


def _ranks(a: Tensor, b: Tensor) -> float:
    """Rank correlation; ties in the order of the rows."""
    x, y = (t.argsort(stable=True).argsort().double() for t in (a, b))
    value = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    return value if math.isfinite(value) else 0.0


def _log(x: Tensor) -> Tensor:
    return (x.clamp_min(0) + 1e-4).log()


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
