"""What happened: one typed record an event, to a JSONL file and to DeepSpeed's monitor.

A line counts once its newline is there. It is written whole, by one write, and synced; a crash can only leave a torn last line, which
readers skip and the next writer cuts off.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

_FIRST_BYTES = b'{"kind": "'  # of every line: `kind` is the first field of FreezeEvent
EventKind = Literal["freeze", "thaw", "decision", "warning"]


class Monitor(Protocol):
    """What is used of `MonitorMaster` (deepspeed/monitor/monitor.py)."""

    enabled: bool

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FreezeEvent:
    """One thing that happened at a step boundary.

    kind: "freeze" and "thaw" (done), "decision" (what a policy wants, not done: dry run), "warning".
    step: successful optimizer steps so far, >= 0.
    layers: the layers that it is about, in order.
    frozen: all frozen layers after it, in order.
    probabilities: for each judged layer the policy's certainty that it has converged, in [0, 1]; NaN is kept (null in the file).
    reasons: for each judged layer one short line.
    bytes_released: bytes of optimizer state, master weights included, that this rank let go; negative where it took them back (thaw).
    bytes_released_total: the same, summed over all ranks.
    seconds: wall time that training stood still for it.
    predicted_seconds: what was predicted just before a freeze (pause.py); 0 where nothing was.
    moved_bytes: bytes that crossed ranks for it, over all ranks.
    dry_run: whether the run only decides.
    message: the text of a warning.
    """

    kind: EventKind
    step: int
    layers: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    probabilities: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    bytes_released: int = 0
    bytes_released_total: int = 0
    seconds: float = 0.0
    predicted_seconds: float = 0.0
    moved_bytes: int = 0
    dry_run: bool = False
    message: str = ""

    def __post_init__(self) -> None:
        assert self.kind in get_args(EventKind), self.kind
        assert self.step >= 0, self.step

    def to_json(self) -> dict[str, Any]:
        """JSON-able: lists, strings, numbers; a probability that is NaN or infinite becomes null."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        data["layers"], data["frozen"], data["reasons"] = list(self.layers), list(self.frozen), dict(self.reasons)
        data["probabilities"] = {name: float(p) if math.isfinite(p) else None for name, p in self.probabilities.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FreezeEvent:
        """The inverse of `to_json`. TypeError, KeyError or AttributeError where `data` is not such a record."""
        probabilities = {name: math.nan if p is None else p for name, p in data["probabilities"].items()}
        return cls(**{**data, "layers": tuple(data["layers"]), "frozen": tuple(data["frozen"]), "probabilities": probabilities})


class EventLog:
    """Appends events to a file and hands them to a monitor.

    path: the JSONL file, on rank 0; None on all other ranks, or where none is wanted. Folders are made, an existing file is continued.
    monitor: DeepSpeed's `MonitorMaster` (`engine.monitor`) or None.

    Raises ValueError naming `smartfrz.log_path` where the file can't be written or is something else. Later, a full disk or the like only
    warns: rank 0 must not leave the others alone in a collective because of a log.
    """

    def __init__(self, path: Path | None, monitor: Monitor | None = None) -> None:
        self.path = path
        self.monitor = monitor if monitor is not None and monitor.enabled else None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                data = file.read()
                if not _is_log(data):
                    raise OSError("it exists and is no log of smartfrz")
                file.truncate(_whole_lines(data))  # what follows is the torn line of a run that died
        except OSError as error:
            raise ValueError(
                f'smartfrz.log_path: got "{path}"; allowed: a path that can be written to, new or a log of an earlier run ({error})'
            ) from error

    def write(self, event: FreezeEvent) -> None:
        """One line, on disk when this returns; the monitor's scalars after it."""
        if self.path is not None:
            try:
                _append(self.path, json.dumps(event.to_json(), allow_nan=False).encode() + b"\n")
            except OSError as error:
                text = f"smartfrz: an event of step {event.step} is not in the log {self.path}: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        if self.monitor is not None and (scalars := _scalars(event)):
            self.monitor.write_events(scalars)

    @property
    def position(self) -> int:
        """Bytes of the file so far: to be kept with a checkpoint, for `truncate_to`. 0 without a file."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def truncate_to(self, position: int) -> None:
        """Drops the events after `position`, which a run that resumes from that checkpoint lives through again.

        Warns and changes nothing where the file can't be the one of which `position` was taken (too short, or no line ends there).
        """
        assert position >= 0, position
        if self.path is None or position == self.position:
            return
        with self.path.open("a+b") as file:
            file.seek(max(position - 1, 0))
            if position > self.position or (position > 0 and file.read(1) != b"\n"):
                text = f"smartfrz: the log {self.path} is not the one of this checkpoint (no event ends at byte {position}): left as it is"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                return
            file.truncate(position)
            os.fsync(file.fileno())


def read_events(path: str | Path) -> list[FreezeEvent]:
    """All events of a log, oldest first.

    A torn last line is skipped with a warning; a broken line before it is a ValueError that says which.
    """
    data = Path(path).read_bytes()
    whole = _whole_lines(data)
    if whole < len(data):
        warnings.warn(f"{path}: skipped the torn last line ({len(data) - whole} bytes)", RuntimeWarning, stacklevel=2)
    events = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        event = _parse(line)
        if event is None:
            raise ValueError(f"{path}, line {number}: not a freeze event: {line[:80]!r}")
        events.append(event)
    return events


def _append(path: Path, line: bytes) -> None:
    """One write and one sync; a line that got in only partly (disk full) is taken out again."""
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError("written only partly: is the disk full?")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise


def _whole_lines(data: bytes) -> int:
    """Length of `data` without a torn last line: one without a newline, or (after a power failure) with bytes that never got there."""
    if not data:
        return 0
    last = data.rfind(b"\n", 0, len(data) - 1) + 1
    return len(data) if data.endswith(b"\n") and _parse(data[last:]) is not None else last


def _is_log(data: bytes) -> bool:
    """Whether all lines are events; a torn last line alone must be the beginning of one. Guards a stranger's file from being cut."""
    whole = _whole_lines(data)
    if whole == 0:
        return data.startswith(_FIRST_BYTES) or _FIRST_BYTES.startswith(data)
    return all(_parse(line) is not None for line in data[:whole].splitlines())


def _parse(line: bytes) -> FreezeEvent | None:
    try:
        return FreezeEvent.from_json(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        return None


def _scalars(event: FreezeEvent) -> list[tuple[str, float, int]]:
    """(name, value, step) as DeepSpeed's monitors take them; bytes are those of all ranks."""
    values: dict[str, float] = {}
    if event.kind in ("freeze", "thaw"):
        values["smartfrz/frozen_layers"] = len(event.frozen)
        values["smartfrz/bytes_released"] = event.bytes_released_total
        values["smartfrz/freeze_seconds"] = event.seconds
    if event.kind == "decision":
        values["smartfrz/frozen_layers"] = len(event.frozen)
    values |= {f"smartfrz/probability/{name}": float(p) for name, p in event.probabilities.items() if math.isfinite(p)}
    return [(name, value, event.step) for name, value in values.items()]
