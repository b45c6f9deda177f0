"""The run's own record: every event of this controller, in memory and in its log, over checkpoints that are loaded.

Two kinds of load are told apart. A checkpoint that is loaded before this controller has taken a step resumes a run whose process ended: the
steps behind the checkpoint are taken again, so the log is cut back, and a copy of what is cut is kept beside it. A checkpoint that is
loaded later (the best model at the end, a rollback) belongs to the same run: nothing is cut, a "load" event is added.
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

# The logs that controllers of this process write now. Weak: an engine that is dropped without destroy() gives its log back.
_WRITING: WeakSet[RunLog] = WeakSet()


class RunLog:
    """Events of one controller. Made on every rank; only rank 0 has a file or a monitor.

    path: as the user wants it (`log_path`), None on other ranks. An engine beside a living one that writes there gets NAME.2.SUFFIX, the
        next one NAME.3.SUFFIX: the same ones after a restart, because engines are made in the same order then.
    monitor, samples: as of `EventLog`.

    Raises ValueError as `EventLog`.
    """

    def __init__(self, path: Path | None, monitor: Monitor | None = None, samples: Callable[[], int] | None = None) -> None:
        self.wanted_path = path
        own = None if path is None else _free(path)
        self._file = EventLog(own, monitor, samples)
        self.events: list[FreezeEvent] = []
        self.trained = False  # whether this controller has taken a step: a checkpoint that is loaded now is loaded into a running run
        self._before = self._file.position  # what earlier processes wrote ends here
        self._first: list[FreezeEvent] = []  # what happened here before the first step
        self._cut: _Cut | None = None
        self._waiting: list[FreezeEvent] = []  # for the first step: loads, and what follows a resume
        self.on_cut: Callable[[Path], None] = lambda kept: None
        self._key = None if own is None else own.resolve()
        if own is not None:
            _WRITING.add(self)

    @property
    def path(self) -> Path | None:
        """The file; None: there is none."""
        return self._file.path

    @property
    def wanted(self) -> bool:
        """Whether anybody sees what is written here."""
        return self._file.wanted

    def add(self, event: FreezeEvent) -> None:
        """Something happened."""
        self.events.append(event)
        if not self.trained and (event.kind == "load" or self._cut is not None):
            self._waiting.append(event)
            return
        if not self.trained:
            self._first.append(event)
        self.write(event)

    def write(self, record: Record) -> None:
        """Write a line to the log.

        A log that a resume has to cut back is cut now, at the first new line: a process that loads a checkpoint only to evaluate it leaves
        the log as it is.
        """
        if self._cut is not None:
            cut, self._cut = self._cut, None
            self._cut_back(cut)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self._file.write(event)
        self._file.write(record)

    def close(self) -> None:
        """Leave the file to the next engine. This one can still write."""
        _WRITING.discard(self)

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the events (decisions are many, and in the log), and where the log stands."""
        position = self._file.position if self._cut is None else self._cut.position
        return {
            "log_position": position,
            "log_mark": self._file.mark(position),
            "events": [event.to_json() for event in self.events if event.kind != "decision"],
        }

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """A checkpoint was loaded before the first step; step: its. Events that happened here before are superseded, but for warnings."""
        held = [FreezeEvent.from_json(event) for event in state["events"]]
        known = {event.message for event in held if event.kind == "warning"}
        own = [dataclasses.replace(event, step=step) for event in self._first if event.kind == "warning" and event.message not in known]
        self.events = [*held, *own]
        self._waiting = []
        if self._before:  # a new log is no mistake
            self._cut = _Cut(int(state["log_position"]), str(state.get("log_mark", "")), step, own)

    def _cut_back(self, cut: _Cut) -> None:
        path = self.path
        assert path is not None
        # Lines of this process alone are no loss.
        lost = cut.position < self._before or any(event.kind != "warning" for event in self._first)
        copy = path.with_name(f"{path.stem}.cut-{cut.step}{path.suffix}") if lost else None
        kept, before = self._file.truncate_to(cut.position, cut.mark, copy=copy), self._file.position
        if before == cut.position:
            for event in cut.again:
                self._file.write(event)
        if kept is not None:
            self.on_cut(kept)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """position, mark: of the checkpoint's log; step: the checkpoint's; again: to be written again behind it."""

    position: int
    mark: str
    step: int
    again: list[FreezeEvent]


def _free(path: Path) -> Path:
    """The first of NAME.SUFFIX, NAME.2.SUFFIX, … that no living controller writes."""
    for number in itertools.count(1):
        own = path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")
        key = own.resolve()
        if any(log._key == key for log in _WRITING):
            gc.collect()  # else it would depend on the garbage collector's mood whether an engine that was dropped still counts
        if not any(log._key == key for log in _WRITING):
            return own
    raise AssertionError
