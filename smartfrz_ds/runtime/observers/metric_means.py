"""The means of metrics since the last freezing stage, for a policy that waits until one no longer falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smartfrz_ds.runtime.run_context import RunContext
from smartfrz_ds.telemetry.metric_feed import MetricFeed

from .protocol import StepObserver


class MetricMeans(StepObserver):
    """Adds up metrics between freezing stages: "loss" as it goes into backward, and all that `observe` reports.

    Args:
        run: The run.
        names: Names of the metrics.
    """

    FOLD = 64  # maximum number of steps whose losses stay on the device

    def __init__(self, run: RunContext, names: Sequence[str]) -> None:
        self._run, self.names = run, tuple(names)
        self.reset()

    def reset(self) -> None:
        self._feeds = [MetricFeed(name) for name in self.names]
        self._sums = [[0.0, 0.0] for _ in self.names]  # of each metric: the sum of its values, and their number

    def record_loss(self, loss: Any) -> None:
        for feed in self._feeds:
            feed.loss(loss)

    def observe(self, metrics: Mapping[str, float]) -> None:
        for feed in self._feeds:
            feed.tell(metrics)

    def step_skipped(self) -> None:
        for feed in self._feeds:
            feed.end_step(applied=False)

    def after_step(self) -> None:
        for feed in self._feeds:
            feed.end_step(applied=True)
        if any(len(feed) >= self.FOLD for feed in self._feeds):
            self._fold()

    def take(self) -> dict[str, float]:
        """Return the means over steps and ranks since the last call, without metrics that have no value. Collective."""
        self._gather()
        means = {name: total / count for name, (total, count) in zip(self.names, self._sums, strict=True) if count}
        self._sums = [[0.0, 0.0] for _ in self.names]
        return means

    def sync_for_checkpoint(self) -> None:
        """Bring the sums to rank 0, so that one state can be saved for all. Collective."""
        self._gather()
        if self._run.ranks.rank != 0:
            self._sums = [[0.0, 0.0] for _ in self.names]

    def state_dict(self) -> dict[str, Any]:
        return {"metric_sums": {name: list(sums) for name, sums in zip(self.names, self._sums, strict=True)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        if self._run.ranks.rank == 0:
            saved = state.get("metric_sums", {})
            self._sums = [[float(x) for x in saved.get(name, (0.0, 0.0))] for name in self.names]

    def _gather(self) -> None:
        self._fold()
        flat = self._run.ranks.all_reduce_sum([x for sums in self._sums for x in sums])
        self._sums = [flat[i : i + 2] for i in range(0, len(flat), 2)]

    def _fold(self) -> None:
        for feed, sums in zip(self._feeds, self._sums, strict=True):
            values = feed.take()
            sums[0] += sum(values)
            sums[1] += len(values)
