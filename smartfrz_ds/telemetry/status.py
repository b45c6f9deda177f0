"""Measures a run every few steps: the status lines of the log, and the monitor's curves.

Costs one clock reading per step and one small reduction every `status_interval` steps; nothing if no rank has a log or a monitor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch.distributed as dist

from smartfrz_ds._version import __version__
from smartfrz_ds.backends.base import Backend
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.layers import Layer

from .events import RunStart, Status
from .metric_feed import MetricFeed
from .run_log import RunLog
from .speaking import RunView

_FOLD = 64  # maximum number of steps whose losses stay on the device
_REMEMBERED = 256  # number of step times without frozen layers over which the usual step time is taken


class RunStatus:
    """Measure a run for its log. Created at attach, on every rank. Collective.

    Args:
        log: The run's record.
        backend: The engine's backend.
        ranks: The collectives of all ranks.
        layers: All layers, front to back.
        interval: Steps between status lines, >= 1.
    """

    def __init__(self, log: RunLog, backend: Backend, ranks: Collectives, layers: Sequence[Layer], interval: int) -> None:
        self._log, self._backend, self._ranks, self._layers, self.interval = log, backend, ranks, layers, interval
        self._on = ranks.all_reduce_sum([float(log.wanted)])[0] > 0
        self._feed = MetricFeed("loss")
        self._losses: list[float] = []
        self._told_start = False
        self._left: float | None = None
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # of steps without and with frozen layers, since the last status
        self._usual: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual_before: float | None = None  # saved by the run that this one resumes
        self._gained, self._own_seconds = 0.0, 0.0
        self.outcome: Callable[[], str] = str  # returns what froze so far, or why nothing did
        self._known = True  # whether the gain of every step with frozen layers could be estimated

    def loss(self, loss: Any) -> None:
        """Add a micro-batch's loss, a tensor of one element."""
        if self._on:
            self._feed.loss(loss)

    def tell(self, metrics: Mapping[str, float]) -> None:
        """Add values that the user observed."""
        if self._on:
            self._feed.tell(metrics)

    def skipped(self) -> None:
        """Discard the current step, which the optimizer skipped."""
        self._feed.end_step(applied=False)
        self._left = None

    def begin(self, run: RunView) -> None:
        """Begin the work after a step, before all other observers.

        Args:
            run: The run; `run.step` already includes the step.
        """
        if not self._on:
            return
        if self._left is not None:
            self._seconds[run.any_frozen].append(time.perf_counter() - self._left)
        self._feed.end_step(applied=True)
        if len(self._feed) >= _FOLD:
            self._losses += self._feed.take()
        if not self._told_start:
            self._told_start = True
            self._log.write(self._start(run))

    def is_due(self, step: int, total_steps: int | None) -> bool:
        """Whether a status line is due after this step."""
        return self._on and (step % self.interval == 0 or step == total_steps)

    def write(self, run: RunView, *, own_seconds: float, lr: float, saved: float) -> None:
        """Write a status line. Collective.

        Args:
            run: The run.
            own_seconds: Seconds that this package has used so far.
            lr: The highest learning rate of the parameter groups.
            saved: Fraction of the training FLOPs saved so far, in [0, 1].
        """
        self._log.write(self._status(run, own_seconds, lr, saved))

    def end(self) -> None:
        """End the work after a step, after all other observers."""
        if self._on:
            self._left = time.perf_counter()

    def restart(self, state: Mapping[str, Any] | None = None) -> None:
        """Start over after a checkpoint load.

        Args:
            state: Output of `state_dict` in the checkpoint; None: start from nothing.
        """
        state = state or {}
        self._told_start, self._left = False, None
        self._seconds, self._losses, self._feed = {False: [], True: []}, [], MetricFeed("loss")
        self._usual.clear()
        self._usual_before = state.get("usual_seconds")
        self._gained, self._known = float(state.get("gained_seconds", 0.0)), bool(state.get("known", True))

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's sums so far."""
        return {"usual_seconds": self._without(), "gained_seconds": self._gained, "known": self._known}

    def _without(self) -> float | None:
        """Return the seconds of a step without frozen layers, None where unknown."""
        return median(self._usual) if self._usual else self._usual_before

    def _status(self, run: RunView, own_seconds: float, lr: float, saved: float) -> Status:
        free, frozen = self._seconds[False], self._seconds[True]
        self._usual.extend(free)
        usual = self._without()
        if frozen and usual is not None:
            self._gained += len(frozen) * (usual - median(frozen))
        self._known = self._known and not (frozen and usual is None)
        self._gained -= own_seconds - self._own_seconds
        self._own_seconds = own_seconds
        losses = self._losses + self._feed.take()
        self._losses, self._seconds = [], {False: [], True: []}
        sent = self._backend.reduced_bytes()
        own = [self._backend.optimizer_bytes(), sent or 0, float(sent is None), sum(losses), len(losses)]
        held, handed, unknown, loss, count = self._ranks.all_reduce_sum(own)
        told = dict(run.metrics)
        return Status(
            step=run.step,
            time=time.time(),
            loss=loss / count if count else told.get("loss"),
            step_seconds=median(free + frozen) if free or frozen else None,
            frozen=run.frozen,
            optimizer_bytes=int(held),
            gradient_bytes=None if unknown else int(handed),
            saved_flops_fraction=saved,
            hours_saved=self._gained / 3600 if self._known else None,
            lr=lr,
            metrics=told,
            usual_seconds=usual,
            outcome=self.outcome(),
        )

    def _start(self, run: RunView) -> RunStart:
        places = [place for layer in self._layers if (place := layer.place) is not None]
        sent = self._backend.reduced_bytes()
        held, handed, unknown = self._ranks.all_reduce_sum([self._backend.optimizer_bytes(), sent or 0, float(sent is None)])
        return RunStart(
            step=run.step - 1,
            time=time.time(),
            layers=run.names,
            kinds=tuple(layer.kind for layer in self._layers),
            weights=tuple(layer.numel for layer in self._layers),
            frozen=run.frozen,
            policy=run.config.policy,
            engine=self._backend.name,
            version=__version__,
            ranks=1 if self._ranks.alone else dist.get_world_size(),
            total_steps=run.total_steps,
            dry_run=run.config.dry_run,
            first_stage=run.first_stage,
            threshold=run.threshold,
            entries=tuple(entry for entry, _ in places),
            bounds=places[0][1] if places else (),
            optimizer_bytes=int(held),
            gradient_bytes=None if unknown else int(handed),
        )
