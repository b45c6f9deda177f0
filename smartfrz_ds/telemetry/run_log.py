"""Keeps the record of a run: every event of this controller, in memory and in its log, across checkpoint loads.

Two kinds of load are distinguished. A checkpoint that is loaded before this controller has taken a step resumes a run whose process ended:
the steps after the checkpoint are repeated, so the log is cut back, and a copy of the removed part is kept beside it. A checkpoint that is
loaded later (the best model at the end, a rollback) belongs to the same run: nothing is cut, and a "load" event is added.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

from .event_log import EventLog, Monitor
from .events import FreezeEvent, Record

# The logs that controllers of this process are writing. Weak: an engine that is dropped without destroy() releases its log.
_WRITING: WeakSet[RunLog] = WeakSet()


class RunLog:
    """The events of one controller. Created on every rank; only rank 0 has a file or a monitor.

    Args:
        path: The file that the user set (`log_path`), None on other ranks. If another living engine writes to it, this one gets
            NAME.2.SUFFIX, the next one NAME.3.SUFFIX: the same after a restart, where engines are created in the same order.
        monitor: As in `EventLog`.
        samples: As in `EventLog`.

    Raises:
        ValueError: As in `EventLog`.
    """

    def __init__(self, path: Path | None, monitor: Monitor | None = None, samples: Callable[[], int] | None = None) -> None:
        self.wanted_path = path
        own = None if path is None else _free(path)
        self._file = EventLog(own, monitor, samples)
        self.events: list[FreezeEvent] = []
        self.trained = False  # whether this controller has taken a step: from then on, a checkpoint is loaded into a running run
        self._before = self._file.position  # end of the part that earlier processes wrote
        self._first: list[FreezeEvent] = []  # events before the first step
        self._cut: _Cut | None = None
        self._waiting: list[FreezeEvent] = []  # written at the first step: loads, and events after a resume
        self.on_cut: Callable[[Path], None] = lambda kept: None
        self._key = None if own is None else own.resolve()
        if own is not None:
            _WRITING.add(self)

    @property
    def path(self) -> Path | None:
        """The file, None where there is none."""
        return self._file.path

    @property
    def wanted(self) -> bool:
        """Whether records go anywhere."""
        return self._file.wanted

    def add(self, event: FreezeEvent) -> None:
        """Add an event, and write it unless it has to wait for the first step."""
        self.events.append(event)
        if not self.trained and (event.kind == "load" or self._cut is not None):
            self._waiting.append(event)
            return
        if not self.trained:
            self._first.append(event)
        self.write(event)

    def write(self, record: Record) -> None:
        """Write a line to the log.

        If a resume requires the log to be cut back, that happens here, at the first new line: a process that loads a checkpoint only to
        evaluate it leaves the log unchanged.
        """
        if self._cut is not None:
            cut, self._cut = self._cut, None
            self._cut_back(cut)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self._file.write(event)
        self._file.write(record)

    def close(self) -> None:
        """Release the file name for the next engine. This one can still write."""
        _WRITING.discard(self)

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the events (without decisions, which are many and in the log) and the current position in the log, for a checkpoint."""
        position = self._file.position if self._cut is None else self._cut.position
        return {
            "log_position": position,
            "log_mark": self._file.mark(position),
            "events": [event.to_json() for event in self.events if event.kind != "decision"],
        }

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """Continue the record of a checkpoint that was loaded before the first step. Of this process's own events, only warnings remain.

        Args:
            state: Output of `state_dict` in the checkpoint.
            step: The checkpoint's step.
        """
        held = [FreezeEvent.from_json(event) for event in state["events"]]
        known = {event.message for event in held if event.kind == "warning"}
        own = [dataclasses.replace(event, step=step) for event in self._first if event.kind == "warning" and event.message not in known]
        self.events = [*held, *own]
        self._waiting = []
        if self._before:  # a log that is new has nothing to cut
            self._cut = _Cut(int(state["log_position"]), str(state.get("log_mark", "")), step, own)

    def _cut_back(self, cut: _Cut) -> None:
        path = self.path
        assert path is not None
        # Lines that only this process wrote are not worth a copy.
        lost = cut.position < self._before or any(event.kind not in ("warning", "cache") for event in self._first)
        copy = path.with_name(f"{path.stem}.cut-{cut.step}{path.suffix}") if lost else None
        kept, before = self._file.truncate_to(cut.position, cut.mark, copy=copy), self._file.position
        if before == cut.position:
            for event in cut.again:
                self._file.write(event)
        if kept is not None:
            self.on_cut(kept)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A pending cut.

    Attributes:
        position: Position in the log when the checkpoint was saved, in bytes.
        mark: Digest of the bytes before it.
        step: The checkpoint's step.
        again: Events to be written again after the cut.
    """

    position: int
    mark: str
    step: int
    again: list[FreezeEvent]


def _free(path: Path) -> Path:
    """Return the first of NAME.SUFFIX, NAME.2.SUFFIX, … that no living controller is writing."""
    for number in itertools.count(1):
        own = path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")
        key = own.resolve()
        if any(log._key == key for log in _WRITING):
            gc.collect()  # otherwise a dropped engine counts or not, depending on when the garbage collector last ran
        if not any(log._key == key for log in _WRITING):
            return own
    raise AssertionError
