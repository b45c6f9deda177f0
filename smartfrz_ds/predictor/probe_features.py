"""Probe features: how much each layer's output on a small batch changed between two freezing stages.

The weights show how far a layer moved; this shows whether the movement affected its output. Requires the Gram
matrices that the controller computes with the setting `probe`, or the similarities of a recording.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # policies import this module
    from smartfrz_ds.model.view import View

PROBE_FEATURES = (
    "log_change",  # log(1 - CKA between this freezing stage and the last one) of the layer's output on the probe
    "log_prefix_change",  # maximum of log_change over this and all earlier active blocks (CKA is not informative for embeddings)
    "log_change_ratio",  # log_change minus its value at the first stage that had one
    "log_stage_lr_remaining",  # log(remaining learning rates / learning rates since the last stage), 0 if unknown
)
RATIO_LIMIT = 6.0  # larger |log ratio| is clipped: beyond e^6 it carries no information
_CHANGE_FLOOR = 1e-6  # of 1 - CKA: smaller values are rounding errors of fp32 representations


@dataclass(frozen=True, kw_only=True)
class ProbeMemory:
    """The values that are remembered of a layer's output on the probe.

    Attributes:
        lr_spent: Learning rate spent up to the last stage at which the layer was active.
        first: log(1 - CKA) at the first stage that had one.
        gram: (n, n) fp64, the matrix of the last stage, with norm 1. It is too large for a checkpoint's JSON, so
            probe features restart at the second stage after a resume.
    """

    lr_spent: float
    first: float | None = None
    gram: Tensor | None = None


class ProbeTracker:
    """Compares each layer's output with that of the last stage. A frozen layer keeps its matrix."""

    def __init__(self) -> None:
        self.memory: dict[str, ProbeMemory] = {}

    def rows(self, view: View, names: Sequence[str], changes: Mapping[str, float] | None = None) -> Tensor | None:
        """Compute the probe features of some layers.

        Args:
            view: The run as seen at this freezing stage. Its `grams` are the centered Gram matrices, (n, n) fp64.
            names: Names of the layers.
            changes: 1 - CKA since the last stage by name, used for layers without a Gram matrix.

        Returns:
            (names, len(PROBE_FEATURES)) fp32, NaN for a layer without features at this stage; None without `grams`
            and `changes`.
        """
        grams = view.grams
        if not grams and changes is None:
            return None
        frozen = set(view.frozen)
        largest = math.log(_CHANGE_FLOOR)
        found: dict[str, list[float]] = {}
        for layer in view.layers:
            if layer.kind == "head":
                continue
            before = self.memory.get(layer.name)
            if layer.name in frozen:
                continue  # it keeps its matrix; the effect of its freeze is in the held features of the weights
            gram = _normalised(grams.get(layer.name))
            change = (changes or {}).get(layer.name) if gram is None else _change(gram, before)
            now = replace(before or ProbeMemory(lr_spent=0.0), lr_spent=view.lr_spent, gram=gram)
            if before is not None and change is not None and math.isfinite(change):
                log_change = math.log(max(_CHANGE_FLOOR, change))
                first = log_change if before.first is None else before.first
                now = replace(now, first=first)
                if layer.kind == "block":
                    largest = max(largest, log_change)
                lr = log_lr_ratio(view.lr_remaining, view.lr_spent - before.lr_spent)
                found[layer.name] = [log_change, largest, log_change - first, lr or 0.0]
            self.memory[layer.name] = now
        nothing = [math.nan] * len(PROBE_FEATURES)
        return torch.tensor([found.get(name, nothing) for name in names]).float().reshape(len(names), len(PROBE_FEATURES))

    def state_dict(self) -> dict[str, Any]:
        """Return JSON-able data: layer name -> fields of its ProbeMemory, without the matrix."""
        return {name: {k: v for k, v in vars(memory).items() if k != "gram"} for name, memory in self.memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.memory = {name: ProbeMemory(**fields) for name, fields in state.items()}


def log_lr_ratio(remaining: float | None, spent: float) -> float | None:
    """Return log(remaining / spent), within ±RATIO_LIMIT.

    Args:
        remaining: Sum of the remaining learning rates; None if unknown.
        spent: Sum of learning rates spent.

    Returns:
        None if `remaining` is unknown.
    """
    if remaining is None:
        return None
    if remaining <= 0:
        return -RATIO_LIMIT
    if spent <= 0:
        return RATIO_LIMIT
    return min(RATIO_LIMIT, max(-RATIO_LIMIT, math.log(remaining) - math.log(spent)))


def _normalised(gram: Tensor | None) -> Tensor | None:
    if gram is None:
        return None
    gram = gram.double()
    norm = float(gram.norm())
    if not math.isfinite(norm):
        return None  # the weights alone judge, and fail if they are not finite either
    return gram / norm if norm > 0 else gram


def _change(gram: Tensor, before: ProbeMemory | None) -> float | None:
    if before is None or before.gram is None or before.gram.shape != gram.shape:
        return None
    return max(0.0, 1.0 - float((gram * before.gram).sum()))
