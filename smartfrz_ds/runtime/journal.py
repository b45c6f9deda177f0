"""The event log and the console lines of a run, in one place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from smartfrz_ds.model.layers import Layer
from smartfrz_ds.runtime.observers.protocol import StepObserver
from smartfrz_ds.telemetry.events import WEIGHTS_ONLY, FreezeEvent
from smartfrz_ds.telemetry.run_log import RunLog
from smartfrz_ds.telemetry.speaking import Speaker

from .run_context import RunContext


class Journal(StepObserver):
    """The record of one run. Created on every rank; only rank 0 writes.

    Args:
        run: The run.
        layers: All layers, front to back.
        monitor: DeepSpeed's monitor or None.
        saved: Returns the fraction of the training FLOPs saved so far, in [0, 1].
    """

    def __init__(self, run: RunContext, layers: Sequence[Layer], *, monitor: Any, saved: Callable[[], float]) -> None:
        self._run, self._state = run, run.state
        path, self._first = run.config.log_path, run.backend.rank == 0
        engine = run.backend.engine
        self.log = RunLog(
            Path(path) if path and self._first else None,
            monitor if self._first else None,
            samples=lambda: int(getattr(engine, "global_samples", 0)),
        )
        self.speaker = Speaker(run, self.log, layers, saved)

    @property
    def trained(self) -> bool:
        """Whether the run has taken a step in this process: from then on, a checkpoint is loaded into a running run."""
        return self.log.trained

    def record(self, event: FreezeEvent) -> None:
        """Record an event, and write its console line."""
        self.log.add(event)
        self.speaker.event(event, by_policy=self._run.time.began is not None)

    def warn(self, text: str) -> None:
        """Record a warning, and raise it as a Python warning on rank 0."""
        self.record(FreezeEvent(kind="warning", step=self._state.step, frozen=self._state.frozen_in_order, message=text))
        if self._first:
            warnings.warn(f"smartfrz: {text}", RuntimeWarning, stacklevel=3)

    def note(self, text: str) -> None:
        """Write a console line that is not an event."""
        self.speaker.note(f"step {self._state.step:,}: {text}")

    def cache(self, text: str) -> None:
        """Record an event of the prefix cache, and write its console line."""
        self.record(FreezeEvent(kind="cache", step=self._state.step, frozen=self._state.frozen_in_order, message=text))

    def note_layers(self, names: Collection[str], text: str) -> None:
        """Write a console line about layers, or parameters, if there are any. text: has {} where their names go."""
        if names:
            self.note(text.format(", ".join(sorted(names))))

    def resumed(self, state: Mapping[str, Any] | None, folder: str) -> None:
        """Note a checkpoint that was loaded before the first step.

        Args:
            state: Its freeze state, None where it has none.
            folder: Its folder, "" where unknown.
        """
        if state is not None:
            self.log.resume(state, self._state.step)
        self.speaker.resumed(folder, None if state is None else state.get("stages"))

    def loaded(self, left: int, folder: str, changed: set[str], *, weights_only: bool = False) -> None:
        """Record a checkpoint that was loaded into the running run.

        Args:
            left: The step before the load.
            folder: The checkpoint's folder, "" where unknown.
            changed: Layers that the load froze or thawed.
            weights_only: Whether only weights were loaded.
        """
        what = f"checkpoint {folder}" if folder else "a freeze state"
        self.record(
            FreezeEvent(
                kind="load",
                step=self._state.step,
                from_step=left,
                layers=self._state.in_order(changed),
                frozen=self._state.frozen_in_order,
                message=what + (WEIGHTS_ONLY if weights_only else ""),
            )
        )

    def after_step(self) -> None:
        self.log.trained = True

    def state_dict(self) -> dict[str, Any]:
        return {"stages": self.speaker.stages.state_dict(), **self.log.state_dict()}

    def remove(self) -> None:
        self.speaker.end()
        self.log.close()
