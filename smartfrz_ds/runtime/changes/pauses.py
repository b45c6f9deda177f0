"""Predicts the pause of a change of the layout, over all stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Parameter

from smartfrz_ds.backends.cost import Bandwidths, PausePrediction, measure_bandwidths, predict_pause
from smartfrz_ds.runtime.run_context import RunContext


class Pauses:
    """Predicts pauses from bandwidths that are measured once, at the first prediction."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._bandwidths: Bandwidths | None = None

    def bandwidths(self) -> Bandwidths:
        """Return the cluster's bandwidths. Collective the first time."""
        if self._bandwidths is None:
            self._bandwidths = measure_bandwidths(self._run.backend.device)
        return self._bandwidths

    def predict(self, leaving: Sequence[Parameter]) -> PausePrediction:
        """Predict the pause of a change after which exactly these parameters are out of the optimizer. Collective."""
        run = self._run
        own = predict_pause(run.backend, leaving, self.bandwidths(), keep=run.keep_steps > 0)
        if not run.backend.is_pipeline:
            return own
        # Each stage has its own: all wait for the slowest.
        seconds = -run.ranks.all_reduce_min([-own.seconds])[0]
        return PausePrediction(seconds=seconds, moved_bytes=self.of_all_stages(own.moved_bytes), cost=own.cost)

    def of_all_stages(self, moved: int) -> int:
        """Add up, over the stages of a pipeline, bytes that moved within the replicas of this stage. Collective there."""
        run = self._run
        if not run.backend.is_pipeline:
            return moved
        return int(run.ranks.all_reduce_sum([float(moved) if run.backend.is_sampling_rank else 0.0])[0])
