"""Writes a run's log: one record per line of a JSONL file, and its numbers to DeepSpeed's monitor.

Each line is written whole, by one write, and synced. A crash can only leave a torn last line, which the next writer cuts off.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from .events import FIRST_BYTES, FreezeEvent, Record, Status, finite, parse, whole_lines

_MARKED_BYTES = 1024
_NO_LOG = "it exists and is not a smartfrz log"


class Monitor(Protocol):
    """The part of `MonitorMaster` that is used here (deepspeed/monitor/monitor.py)."""

    enabled: bool

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
        """Write (name, value, step) triples."""
        ...


class EventLog:
    """Append records to a file and pass their numbers to a monitor.

    A failing write, for example on a full disk, only warns: rank 0 must not leave the others waiting in a collective because of a log.

    Args:
        path: The JSONL file, on rank 0; None on all other ranks, and where no log is wanted. Missing folders are created, an existing log
            is continued.
        monitor: DeepSpeed's `MonitorMaster` (`engine.monitor`) or None.
        samples: Returns the number of samples seen so far: the x axis for Weights & Biases. DeepSpeed reports its own numbers by samples,
            and W&B drops values with a smaller x than the last. The other monitors get steps.

    Raises:
        ValueError: `smartfrz.log_path` cannot be written, or is a file that is not a log.
    """

    def __init__(self, path: Path | None, monitor: Monitor | None = None, samples: Callable[[], int] | None = None) -> None:
        self.path = path
        self._samples = samples
        self.monitor = monitor if monitor is not None and monitor.enabled else None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                data = file.read()
                if not _is_whole_log(data):
                    raise OSError(_NO_LOG)
                file.truncate(whole_lines(data))  # drops the torn line of a run that died
        except OSError as error:
            raise ValueError(_refusal(path, error)) from error

    @property
    def wanted(self) -> bool:
        """Whether the records go anywhere."""
        return self.path is not None or self.monitor is not None

    def write(self, event: Record) -> None:
        """Append one line, which is on disk when this returns, then pass its scalars to the monitor."""
        if self.path is not None:
            try:
                _append(self.path, json.dumps(event.to_json(), allow_nan=False).encode() + b"\n")
            except OSError as error:
                text = f"smartfrz: could not write an event of step {event.step} to the log {self.path}: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        if self.monitor is not None and (scalars := _scalars(event)):
            self._report(self.monitor, scalars)

    def _report(self, monitor: Any, scalars: list[tuple[str, float, int]]) -> None:
        wandb = getattr(monitor, "wandb_monitor", None)  # deepspeed/monitor/monitor.py: MonitorMaster has one of each kind
        if wandb is None or self._samples is None:
            monitor.write_events(scalars)
            return
        for each in (monitor.tb_monitor, monitor.csv_monitor, monitor.comet_monitor):
            if each is not None:
                each.write_events(scalars)
        wandb.write_events([(name, value, self._samples()) for name, value, _ in scalars])

    @property
    def position(self) -> int:
        """Current size of the file in bytes, 0 without a file. A checkpoint saves it for `truncate_to`."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def mark(self, position: int | None = None) -> str:
        """Return a digest of the last bytes before `position`, which shows whether a position belongs to this file.

        Args:
            position: Bytes; None: the end of the file.

        Returns:
            16 hexadecimal digits, "" without a file.
        """
        if self.path is None or not self.path.exists():
            return ""
        end = self.position if position is None else position
        with self.path.open("rb") as file:
            file.seek(max(end - _MARKED_BYTES, 0))
            return hashlib.sha256(file.read(min(end, _MARKED_BYTES))).hexdigest()[:16]

    def truncate_to(self, position: int, mark: str = "", *, copy: Path | None = None) -> Path | None:
        """Drop the records after `position`: a run that resumes from that checkpoint will write them again.

        Warns and changes nothing where the file cannot be the one that `position` was taken from (too short, no line ends there, other
        bytes before it), or where the copy cannot be written.

        Args:
            position: Bytes: the property `position` when the checkpoint was saved.
            mark: Result of the method `mark` at that time; "" where unknown.
            copy: File that receives the dropped records, with a number in its name where it exists already. None: they are not kept.

        Returns:
            The file that received the dropped records, None where there is none.
        """
        assert position >= 0, position
        if self.path is None or position == self.position:
            return None
        try:
            with self.path.open("a+b") as file:
                file.seek(max(position - 1, 0))
                fits = position <= self.position and (position == 0 or file.read(1) == b"\n")
                if not fits or (mark and mark != self.mark(position)):
                    text = f"smartfrz: the log {self.path} does not belong to this checkpoint (no event ends at byte {position})"
                    warnings.warn(f"{text}: left unchanged", RuntimeWarning, stacklevel=2)
                    return None
                file.seek(position)
                kept = None if copy is None else _keep(copy, file.read())
                file.truncate(position)
                os.fsync(file.fileno())
                return kept
        except OSError as error:
            text = f"smartfrz: the log {self.path} could not be cut back to the checkpoint; new events are appended to it: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return None


def why_not_a_log(path: Path) -> str:
    """Explain why `EventLog` would refuse a path. Creates nothing that stays.

    Returns:
        The error's text; "" if the path can be used.
    """
    try:
        if path.exists():
            with path.open("r+b") as file:
                if not _is_whole_log(file.read()):
                    raise OSError(_NO_LOG)
        else:
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            with tempfile.TemporaryFile(dir=folder):  # os.access says yes to root for folders of read-only file systems
                pass
    except OSError as error:
        return _refusal(path, error)
    return ""


def _refusal(path: Path, error: OSError) -> str:
    return f'smartfrz.log_path: got "{path}"; allowed: a writable path, of a new file or of the log of an earlier run ({error})'


def _keep(path: Path, data: bytes) -> Path:
    """Write `data` to a new file: `path`, or the first name with a number that is free."""
    for number in itertools.count(1):
        free = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            with free.open("xb") as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    free.unlink()
                    raise
            return free
        except FileExistsError:
            continue
    raise AssertionError


def _append(path: Path, line: bytes) -> None:
    """Append with one write and one sync. A line that was written only in part (disk full) is removed again."""
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError("written only in part: is the disk full?")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise


def _is_whole_log(data: bytes) -> bool:
    """Whether all lines are records, and a torn line that stands alone begins like one. Protects other files from being truncated."""
    whole = whole_lines(data)
    if whole == 0:
        return data.startswith(FIRST_BYTES) or FIRST_BYTES.startswith(data)
    return all(parse(line) is not None for line in data[:whole].splitlines())


def _scalars(record: Record) -> list[tuple[str, float, int]]:
    """(name, value, step) as DeepSpeed's monitors take them; bytes are summed over all ranks."""
    values: dict[str, float | None] = {}
    if isinstance(record, Status):
        values["smartfrz/frozen_layers"] = len(record.frozen)
        names = ("step_seconds", "optimizer_bytes", "gradient_bytes", "saved_flops_fraction", "hours_saved")
        values |= {f"smartfrz/{name}": getattr(record, name) for name in names}
    elif isinstance(record, FreezeEvent):
        if record.kind in ("freeze", "thaw"):
            values["smartfrz/bytes_released"] = record.bytes_released_total
            values["smartfrz/freeze_seconds"] = record.seconds
        if record.kind in ("freeze", "thaw", "decision", "load"):
            values["smartfrz/frozen_layers"] = len(record.frozen)
        values |= {f"smartfrz/probability/{name}": float(p) for name, p in record.probabilities.items()}
    return [(name, value, record.step) for name, value in values.items() if finite(value) is not None and value is not None]
