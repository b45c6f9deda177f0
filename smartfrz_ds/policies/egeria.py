"""The `egeria` policy: freeze the front layer when its plasticity no longer changes.

Source: Wang et al., "Egeria: Efficient DNN Training with Knowledge-Guided Layer Freezing", EuroSys 2023 (arXiv
2201.06227), section 4. The similarity-preserving loss is from Tung and Mori, "Similarity-Preserving Knowledge
Distillation", ICCV 2019.

Differences from the paper: Egeria compares with a quantized copy of the model on the host, which is refreshed from time
to time. Such a copy is expensive under ZeRO-3. The loss only needs the Gram matrices of the copy's activations, so
those of the last refresh are kept, in full precision. They are centered and belong to a fixed probe batch. Egeria thaws
everything when the learning rate falls to a tenth; this policy never thaws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.model.tensor_json import decode, encode
from smartfrz_ds.model.view import Need, View

from .base import Decision, body, front_while, judges


class EgeriaPolicy:
    """Freezes the front layer when the slope of its plasticity has become small.

    At each freezing stage a layer's plasticity is the similarity-preserving loss between its activations and the
    reference's, smoothed by a moving average over `window` stages. A straight line is fitted through the last `window`
    smoothed values. The front layer freezes after the line's slope was at most `tolerance` of its steepest so far at
    `window` consecutive stages since the layer came to the front. An embedding is judged by the first block behind it.
    """

    name = "egeria"
    needs: frozenset[Need] = frozenset({"activations"})

    def __init__(self, window: int = 3, tolerance: float = 0.2, refresh: int = 3) -> None:
        """Check the settings.

        Args:
            window: Freezing stages, >= 2.
            tolerance: Share of the steepest slope, in (0, 1).
            refresh: Freezing stages between two references, >= 1. A new reference makes the plasticity drop; this
                averages out if `refresh` does not exceed `window`.

        Raises:
            ValueError: A value is out of range.
        """
        if window < 2:
            raise ValueError(f"smartfrz.egeria.window: got {window}; allowed: an integer >= 2")
        if not 0.0 < tolerance < 1.0:
            raise ValueError(f"smartfrz.egeria.tolerance: got {tolerance}; allowed: a number in (0, 1)")
        if refresh < 1:
            raise ValueError(f"smartfrz.egeria.refresh: got {refresh}; allowed: an integer >= 1")
        self.window, self.tolerance, self.refresh = window, tolerance, refresh
        self._stages = 0  # since the last refresh
        self._reference: dict[str, Tensor] = {}
        self._plasticity: dict[str, list[float]] = {}  # of each block, oldest first, up to two windows
        self._steepest: dict[str, float] = {}
        self._flat: tuple[str, int] = ("", 0)  # the front block, and the number of consecutive stages at which its slope was small

    def decide(self, view: View) -> Decision:
        """Update the plasticity of all layers and judge the front one.

        Args:
            view: The run as seen at this freezing stage.

        Raises:
            ValueError: A Gram matrix is not finite; names the layer. The policy's state is unchanged.
        """
        rows = {name: similarity_rows(gram, name) for name, gram in view.grams.items()}
        judge, names = judges(view), body(view)
        slopes = self._follow(rows, view)
        front = next((judge[name] for name in names if name not in view.frozen and name in judge), "")
        slope, steepest = slopes.get(front), self._steepest.get(front, 0.0)
        flat = 0
        if slope is not None and slope <= self.tolerance * steepest:
            flat = 1 + (self._flat[1] if self._flat[0] == front else 0)
        self._flat = (front, flat)
        with_front = [name for name in names if judge.get(name) == front]
        if slope is None:
            state = "not judged yet: no output for the probe batch, or too few stages"
        else:
            state = f"slope of the plasticity {slope:.2e}, steepest {steepest:.2e}; small at {flat} of {self.window} stages"
        reasons = {name: state for name in with_front if name in view.candidates}
        return Decision(freeze=front_while(view, with_front) if flat >= self.window else (), reasons=reasons)

    def _follow(self, rows: Mapping[str, Tensor], view: View) -> dict[str, float]:
        """Record one stage's activations; return the slope of each active block that has enough stages."""
        slopes = {}
        for layer in view.layers:
            name = layer.name
            if layer.kind != "block" or name in view.frozen or name not in rows or name not in self._reference:
                continue
            if rows[name].shape != self._reference[name].shape:  # the probe changed at a resume: start over
                del self._reference[name]
                self._plasticity.pop(name, None)
                continue
            values = self._plasticity.setdefault(name, [])
            values.append(preserving_loss(rows[name], self._reference[name]))
            del values[: -(2 * self.window - 1)]  # enough for `window` smoothed values
            if len(values) == 2 * self.window - 1:
                slopes[name] = abs(slope_of(moving_average(values, self.window)))
                self._steepest[name] = max(self._steepest.get(name, 0.0), slopes[name])
        self._stages += 1
        if not self._reference or self._stages >= self.refresh:
            self._reference, self._stages = dict(rows), 0
        return slopes

    def state_dict(self) -> dict[str, Any]:
        """Return the policy's state as JSON-able data."""
        return {
            "stages": self._stages,
            "reference": {name: encode(rows) for name, rows in self._reference.items()},
            "plasticity": {name: list(values) for name, values in self._plasticity.items()},
            "steepest": dict(self._steepest),
            "flat": list(self._flat),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._stages = int(state["stages"])
        self._reference = {name: decode(rows) for name, rows in state["reference"].items()}
        self._plasticity = {name: [float(v) for v in values] for name, values in state["plasticity"].items()}
        self._steepest = {name: float(v) for name, v in state["steepest"].items()}
        self._flat = (str(state["flat"][0]), int(state["flat"][1]))


def similarity_rows(gram: Tensor, name: str) -> Tensor:
    """Normalize the similarities between the inputs, so that each row has length 1.

    Args:
        gram: (n, n) fp64.
        name: Name of the layer, for the message.

    Returns:
        (n, n) fp64.

    Raises:
        ValueError: The Gram matrix is not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError(f"layer {name}: its output for the probe batch contains NaN or an infinite value")
    return torch.nn.functional.normalize(gram, dim=1)


def preserving_loss(rows: Tensor, reference: Tensor) -> float:
    """Return the similarity-preserving loss ‖R - R'‖² / n² of two results of `similarity_rows`, (n, n) each."""
    return float((rows - reference).square().mean())


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Return the means of `window` neighbours: len(values) - window + 1 of them."""
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def slope_of(values: Sequence[float]) -> float:
    """Return the slope per value of the least-squares line. Requires at least 2 values."""
    mean_x, mean_y = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values))
    return above / sum((x - mean_x) ** 2 for x in range(len(values)))
