"""The `attention` policy: the predictor of SmartFRZ decides.

Source: Li et al., "SmartFRZ: An Efficient Training Framework using Attention-Based Layer Freezing", ICLR 2023 (arXiv
2401.16720). The inputs differ from the paper's: see predictor/features.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from smartfrz_ds.model.view import Need, View
from smartfrz_ds.predictor.constants import MIN_SNAPSHOTS
from smartfrz_ds.predictor.features import FeatureExtractor
from smartfrz_ds.predictor.model import load_predictor

from .base import Decision, judges
from .budget import Budget


class AttentionPolicy:
    """Freezes every layer that the predictor has called converged at `patience` consecutive freezing stages.

    In mode "budget" it freezes front to back so that a given share of the FLOPs is saved (budget.py).

    An embedding is judged by the first block behind it, because its own drift and similarity carry no information. A
    layer is judged once it has MIN_SNAPSHOTS snapshots.
    """

    name = "attention"

    def __init__(
        self,
        predictor: str | Path | None = None,
        threshold: float | None = None,
        patience: int = 2,
        mode: Literal["auto", "budget"] = "auto",
        budget: float = 0.3,
        max_frozen_fraction: float = 0.75,
    ) -> None:
        """Load the predictor.

        Args:
            predictor: A file written by `smartfrz train-predictor`; None: the shipped one.
            threshold: Probability in (0, 1) from which a layer counts as converged; None: the threshold stored in the
                file.
            patience: Consecutive freezing stages that must agree, >= 1.
            mode: "auto", or "budget": save the share `budget` regardless of the threshold.
            budget: Share of the run's training FLOPs to save in mode "budget", in (0, 0.6].
            max_frozen_fraction: Share of all layers (head included) that may freeze in mode "budget", in (0, 1].

        Raises:
            ValueError: A value is out of range, or the file is not a predictor.
        """
        if threshold is not None and not 0.0 < threshold < 1.0:
            raise ValueError(f"smartfrz.attention.threshold: got {threshold}; allowed: a number in (0, 1), or null")
        if patience < 1:
            raise ValueError(f"smartfrz.attention.patience: got {patience}; allowed: an integer >= 1")
        if mode not in ("auto", "budget"):
            raise ValueError(f"smartfrz.attention.mode: got {mode!r}; allowed: 'auto' or 'budget'")
        if not 0.0 < budget <= 0.6:
            raise ValueError(f"smartfrz.attention.budget: got {budget}; allowed: a number in (0, 0.6]")
        self._model = load_predictor(predictor)
        self.threshold = self._model.threshold if threshold is None else threshold
        self.patience = patience
        self._budget = Budget(budget, max_frozen_fraction) if mode == "budget" else None
        self.needs: frozenset[Need] = frozenset({"weights", "total_steps"} if mode == "budget" else {"weights"})
        self._extractor = FeatureExtractor()
        self._streak: dict[str, int] = {}  # consecutive freezing stages at which a layer was called converged
        self._held: dict[str, float] = {}  # the last probability of every layer judged so far

    def decide(self, view: View) -> Decision:
        """Judge each candidate by the predictor's probability.

        Args:
            view: The run as seen at this freezing stage.

        Raises:
            ValueError: Sampled weights of a layer are not finite; names the layer. The policy's state is unchanged.
        """
        batch = self._extractor.extract(view)
        probabilities = dict(zip(batch.names, self._model.probabilities(batch).tolist(), strict=True))
        self._streak = {name: self._streak.get(name, 0) + 1 for name, p in probabilities.items() if p >= self.threshold}
        self._held |= probabilities

        judge_of = judges(view)
        frozen = set(view.frozen)
        freeze: list[str] = []
        reasons: dict[str, str] = {}
        shown: dict[str, float] = {}
        for name in view.candidates:
            judge = judge_of.get(name)
            if judge is None:
                continue
            by = "" if judge == name else f", judged by {judge}"
            # A judge that is already frozen (order "any") no longer changes: its last probability stays valid.
            probability = probabilities.get(judge, self._held.get(judge) if judge in frozen else None)
            if probability is None:
                reasons[name] = f"not judged yet: fewer than {MIN_SNAPSHOTS} snapshots{by}"
                continue
            shown[name] = probability
            streak = self.patience if judge in frozen and probability >= self.threshold else self._streak.get(judge, 0)
            if probability < self.threshold:
                reasons[name] = f"still moving: {probability:.3f} < {self.threshold:.3f}{by}"
            elif streak < self.patience:
                reasons[name] = f"converged at {streak} of {self.patience} stages: {probability:.3f} >= {self.threshold:.3f}{by}"
            else:
                reasons[name] = f"converged: {probability:.3f} >= {self.threshold:.3f}{by}"
                freeze.append(name)
        if self._budget is not None:
            return self._budget.decide(view, shown)
        return Decision(freeze=tuple(freeze), reasons=reasons, probabilities=shown)

    def state_dict(self) -> dict[str, Any]:
        """Return the policy's state as JSON-able data."""
        state = {"features": self._extractor.state_dict(), "streak": dict(self._streak), "held": dict(self._held)}
        return state if self._budget is None else state | {"budget": self._budget.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._extractor.load_state_dict(state["features"])
        self._streak, self._held = dict(state["streak"]), dict(state["held"])
        if self._budget is not None and "budget" in state:
            self._budget.load_state_dict(state["budget"])
