"""The `attention` policy: SmartFRZ's predictor decides (Li et al., ICLR 2023; the inputs are ours, see predictor/features.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smartfrz_ds.predictor.features import MIN_SNAPSHOTS, FeatureExtractor
from smartfrz_ds.predictor.model import load_predictor

from .base import Decision, Need, View


class AttentionPolicy:
    """Names every layer that the predictor has called converged at `patience` freezing stages in a row.

    An embedding is judged by the first block behind it: its own drift and similarity say nothing. A layer is judged from MIN_SNAPSHOTS
    snapshots on.
    """

    name = "attention"
    needs: frozenset[Need] = frozenset({"weights"})

    def __init__(self, predictor: str | Path | None = None, threshold: float | None = None, patience: int = 2) -> None:
        """predictor: a file of `smartfrz train-predictor`, None: the shipped one. threshold: in (0, 1), None: the file's own.

        patience: freezing stages in a row that must agree, >= 1. Raises ValueError for anything else.
        """
        if threshold is not None and not 0.0 < threshold < 1.0:
            raise ValueError(f"smartfrz.attention.threshold: got {threshold}; allowed: a number in (0, 1), or null")
        if patience < 1:
            raise ValueError(f"smartfrz.attention.patience: got {patience}; allowed: an integer >= 1")
        self._model = load_predictor(predictor)
        self.threshold = self._model.threshold if threshold is None else threshold
        self.patience = patience
        self._extractor = FeatureExtractor()
        self._streak: dict[str, int] = {}  # freezing stages in a row at which a layer was called converged
        self._held: dict[str, float] = {}  # the last probability of each layer that was ever judged

    def decide(self, view: View) -> Decision:
        """Raises ValueError, naming the layer, where sampled weights are not finite; the policy's state is then as before."""
        batch = self._extractor.extract(view)
        probabilities = dict(zip(batch.names, self._model.probabilities(batch).tolist(), strict=True))
        self._streak = {name: self._streak.get(name, 0) + 1 for name, p in probabilities.items() if p >= self.threshold}
        self._held |= probabilities

        judges = _judges(view)
        frozen = set(view.frozen)
        freeze: list[str] = []
        reasons: dict[str, str] = {}
        shown: dict[str, float] = {}
        for name in view.candidates:
            judge = judges.get(name)
            if judge is None:
                continue
            by = "" if judge == name else f", judged by {judge}"
            # A judge that is frozen already (order "any") stands still: what was said last about it holds.
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
        return Decision(freeze=tuple(freeze), reasons=reasons, probabilities=shown)

    def state_dict(self) -> dict[str, Any]:
        return {"features": self._extractor.state_dict(), "streak": dict(self._streak), "held": dict(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._extractor.load_state_dict(state["features"])
        self._streak, self._held = dict(state["streak"]), dict(state["held"])


def _judges(view: View) -> dict[str, str]:
    """Whose window decides about a layer: its own for a block, the next block's for an embedding."""
    judges: dict[str, str] = {}
    block: str | None = None
    for layer in reversed(view.layers):
        if layer.kind == "block":
            block = layer.name
        if block is not None and layer.kind != "head":
            judges[layer.name] = block
    return judges
