"""The `band` policy: freeze the front and the back of the network at one step; a band of layers in the middle trains.

Source: in post-training with reinforcement learning, layers in the middle carry most of the gain (arXiv 2607.01232).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import LayerInfo, Need, View
from smartfrz_ds.policies.base import Decision
from smartfrz_ds.policies.timing import check_share, check_step, step_of


class BandPolicy:
    """Freezes every layer outside the band that may freeze (never the head) from one step on."""

    name = "band"
    needs: frozenset[Need] = frozenset()

    def __init__(
        self,
        width: float = 0.4,
        center: float = 0.5,
        start_step: int | None = None,
        share: float = 0.1,
        max_frozen_fraction: float = 0.75,
    ) -> None:
        """Check the settings.

        Args:
            width: Share of the body's layers that trains, in (0, 1); rounded to whole layers, at least one.
            center: Position of the band's middle in the body, in [0, 1].
            start_step: The step of the freeze, >= 0; None: after `share` of the run.
            share: Share of the run's steps before the freeze, in [0, 1).
            max_frozen_fraction: The run's limit, as a share of all layers.

        Raises:
            ValueError: A value is out of range.
        """
        check_step("smartfrz.band.start_step", start_step)
        check_share("smartfrz.band.share", share)
        if not 0.0 < width < 1.0:
            raise ValueError(f"smartfrz.band.width: got {width}; allowed: a number in (0, 1)")
        if not 0.0 <= center <= 1.0:
            raise ValueError(f"smartfrz.band.center: got {center}; allowed: a number in [0, 1]")
        self.width, self.center, self.max_frozen_fraction = width, center, max_frozen_fraction
        self.start_step, self.share = start_step, share

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Check that the step is known, and that everything outside the band may freeze.

        Args:
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.

        Raises:
            ValueError: The step is not set and the run's length is unknown, or max_frozen_fraction is too small: the run would freeze only
                a part, from the front.
        """
        self._start(total_steps)
        body = _body(layers)
        outside = len(body) - len(self.band(layers))
        if outside > int(self.max_frozen_fraction * len(layers) + 1e-9):
            raise ValueError(
                f"smartfrz.max_frozen_fraction: got {self.max_frozen_fraction}; allowed with smartfrz.band.width {self.width}: at least "
                f"{outside / len(layers):.3f}, for {outside} of {len(layers)} layers"
            )

    def band(self, layers: tuple[LayerInfo, ...]) -> tuple[str, ...]:
        """Return the layers that go on training, front to back, without the head."""
        body = _body(layers)
        count = min(len(body), max(1, round(self.width * len(body))))
        first = round(self.center * len(body) - count / 2)
        first = min(max(first, 0), len(body) - count)
        return tuple(body[first : first + count])

    def decide(self, view: View) -> Decision:
        """Freeze everything outside the band once the step is reached."""
        if view.step < self._start(view.total_steps):
            return Decision()
        band = self.band(view.layers)
        chosen = tuple(name for name in view.candidates if name not in band)
        return Decision(freeze=chosen, reasons=dict.fromkeys(chosen, f"outside the band {' … '.join(dict.fromkeys((band[0], band[-1])))}"))

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the step alone decides."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def _start(self, total_steps: int | None) -> int:
        return step_of("smartfrz.band.start_step", self.start_step, self.share, total_steps)


def _body(layers: tuple[LayerInfo, ...]) -> list[str]:
    return [layer.name for layer in layers if layer.kind != "head" and layer.numel > 0]
