"""Constants of the predictor that settings and commands need too. Imports nothing, so that `smartfrz --help` works without torch."""

from __future__ import annotations

from typing import Literal

MIN_SNAPSHOTS = 10
"""Layers with fewer snapshots in their window are not judged. Training uses windows of every length from this one to the full one."""

CONVERGED = 0.98
"""Similarity to the final model from which a prefix counts as converged: above it, freezing has almost no effect on the loss."""

Rule = Literal["prefix-settled", "settled", "now", "published"]
RULES: tuple[Rule, ...] = ("prefix-settled", "settled", "now", "published")
"""The rules by which recordings are labelled (`recording.labels.LabelSettings`)."""
