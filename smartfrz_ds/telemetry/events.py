"""What happened and how the run stands: one typed record a line, to a JSONL file and to DeepSpeed's monitor.

A line counts once its newline is there. It is written whole, by one write, and synced; a crash can only leave a torn last line, which
readers skip and the next writer cuts off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

_FIRST_BYTES = b'{"kind": "'  # of every line
_MARKED_BYTES = 1024
WEIGHTS_ONLY = ", weights only"  # how the message of a load ends that left everything else as it was
EventKind = Literal["freeze", "thaw", "decision", "warning", "rebalance", "load"]


class Monitor(Protocol):
    """What is used of `MonitorMaster` (deepspeed/monitor/monitor.py)."""

    enabled: bool

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FreezeEvent:
    """One thing that happened at a step boundary.

    kind: "freeze" and "thaw" (done), "decision" (what a policy wants, not done: dry run), "warning", "rebalance" (layers of a pipeline have
        moved to other stages), "load" (a checkpoint was loaded while this run was going on: see run_log.py).
    step: successful optimizer steps so far, >= 0; of a "load" those of the checkpoint.
    layers: the layers that it is about, in order; of a "load" those that are frozen now and weren't before it, or the other way round.
    frozen: all frozen layers after it, in order.
    probabilities: for each judged layer the policy's certainty that it has converged, in [0, 1]; NaN is kept (null in the file).
    reasons: for each judged layer one short line.
    bytes_released: bytes of optimizer state, master weights included, that this rank let go; negative where it took them back (thaw).
    bytes_released_total: the same, summed over all ranks.
    seconds: wall time that training stood still for it.
    predicted_seconds: what was predicted just before a freeze (pause.py); 0 where nothing was.
    moved_bytes: bytes that crossed ranks for it, over all ranks.
    dry_run: whether the run only decides.
    message: the text of a warning, or the checkpoint that was loaded.
    bounds: of the stages in the pipeline's list of layers after a re-balance.
    gain: how many times faster a step was predicted to be after it; 1 where no costs were known.
    from_step: the step at which a "load" was done, else 0.
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
    bounds: tuple[int, ...] = ()
    gain: float = 1.0
    from_step: int = 0

    def __post_init__(self) -> None:
        assert self.kind in get_args(EventKind), self.kind
        assert self.step >= 0 and self.from_step >= 0, (self.step, self.from_step)

    @property
    def goes_back(self) -> bool:
        """Whether the run goes on from a checkpoint that was loaded (of any step; not its weights alone)."""
        return self.kind == "load" and not self.message.endswith(WEIGHTS_ONLY)

    def to_json(self) -> dict[str, Any]:
        """JSON-able: lists, strings, numbers; a probability that is NaN or infinite becomes null."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        data["layers"], data["frozen"], data["reasons"] = list(self.layers), list(self.frozen), dict(self.reasons)
        data["bounds"] = list(self.bounds)
        data["probabilities"] = {name: float(p) if math.isfinite(p) else None for name, p in self.probabilities.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FreezeEvent:
        """The inverse of `to_json`. TypeError, KeyError or AttributeError where `data` is not such a record."""
        probabilities = {name: math.nan if p is None else p for name, p in data["probabilities"].items()}
        tuples = {key: tuple(data.get(key, ())) for key in ("layers", "frozen", "bounds")}
        return cls(**{**data, **tuples, "probabilities": probabilities})


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """A process begins to train: the first line of a run in the log, and one more each time a checkpoint was loaded.

    step: 0, or that of the checkpoint. time: seconds since 1970.
    layers, kinds, weights: names of all layers, front to back; "embedding", "block" or "head"; number of weights, 0: the user froze them.
    frozen: frozen layers at that moment. policy, engine, version: names, and this package's version. ranks: how many.
    total_steps: of the whole run, None: unknown. dry_run: whether the run only decides.
    first_stage: the step of the first freezing stage, None: no policy decides, or not known.
    optimizer_bytes, gradient_bytes: as of `Status`, before anything else happens; None: not known.
    """

    step: int
    time: float
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    weights: tuple[int, ...]
    frozen: tuple[str, ...] = ()
    policy: str = ""
    engine: str = ""
    version: str = ""
    ranks: int = 1
    total_steps: int | None = None
    dry_run: bool = False
    first_stage: int | None = None
    optimizer_bytes: int | None = None
    gradient_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able, `kind` first."""
        return {"kind": "start"} | _plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunStart:
        """The inverse of `to_json`. TypeError or KeyError where `data` is not such a record."""
        lists = {name: tuple(data[name]) for name in ("layers", "kinds", "weights", "frozen")}
        return cls(**{key: value for key, value in data.items() if key != "kind"} | lists)


@dataclass(frozen=True, kw_only=True)
class Status:
    """How the run stands after a step, every `status_interval` steps. None: not known.

    time: seconds since 1970.
    loss: mean of what went into backward since the last status, over micro-batches and ranks; else the newest `observe(loss=…)`.
    step_seconds: median since the last status, from the end of one step to the end of the next, without this package's hooks.
    frozen: the frozen layers after this step.
    optimizer_bytes: of optimizer state and separate master weights, over all ranks.
    gradient_bytes: of the gradients that all ranks together hand to reductions in a step.
    saved_flops_fraction: share of the training FLOPs so far, forward and backward, that freezing has saved.
    hours_saved: steps with frozen layers × what they are faster by than the median step without, minus this package's own time.
    lr: the highest learning rate of the parameter groups, of the step after this one.
    metrics: the newest observed values.
    usual_seconds: median of the steps without frozen layers so far.
    outcome: what froze so far, or why nothing did, for people.
    """

    step: int
    time: float
    loss: float | None = None
    step_seconds: float | None = None
    frozen: tuple[str, ...] = ()
    optimizer_bytes: int = 0
    gradient_bytes: int | None = None
    saved_flops_fraction: float = 0.0
    hours_saved: float | None = None
    lr: float = 0.0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    usual_seconds: float | None = None
    outcome: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-able, `kind` first; what is no finite number becomes null."""
        data = {"kind": "status"} | _plain(self) | {"metrics": {name: _finite(value) for name, value in self.metrics.items()}}
        return {key: _finite(value) if isinstance(value, float) else value for key, value in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Status:
        """The inverse of `to_json`. TypeError or KeyError where `data` is not such a record."""
        return cls(**{key: value for key, value in data.items() if key != "kind"} | {"frozen": tuple(data["frozen"])})


Record = FreezeEvent | RunStart | Status


class EventLog:
    """Appends records to a file and hands their numbers to a monitor.

    path: the JSONL file, on rank 0; None on all other ranks, or where none is wanted. Folders are made, an existing file is continued.
    monitor: DeepSpeed's `MonitorMaster` (`engine.monitor`) or None.
    samples: how many samples the run has seen: where Weights & Biases puts the numbers, because DeepSpeed counts its own there so and
        W&B drops whatever comes with a smaller count. The other monitors get steps.

    Raises ValueError naming `smartfrz.log_path` where the file can't be written or is something else. Later, a full disk or the like only
    warns: rank 0 must not leave the others alone in a collective because of a log.
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
                if not _is_log(data):
                    raise OSError("it exists and is no log of smartfrz")
                file.truncate(_whole_lines(data))  # what follows is the torn line of a run that died
        except OSError as error:
            raise ValueError(
                f'smartfrz.log_path: got "{path}"; allowed: a path that can be written to, new or a log of an earlier run ({error})'
            ) from error

    @property
    def wanted(self) -> bool:
        """Whether anybody sees what is written here."""
        return self.path is not None or self.monitor is not None

    def write(self, event: Record) -> None:
        """One line, on disk when this returns; the monitor's scalars after it."""
        if self.path is not None:
            try:
                _append(self.path, json.dumps(event.to_json(), allow_nan=False).encode() + b"\n")
            except OSError as error:
                text = f"smartfrz: an event of step {event.step} is not in the log {self.path}: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        if self.monitor is not None and (scalars := _scalars(event)):
            self._hand_over(self.monitor, scalars)

    def _hand_over(self, monitor: Any, scalars: list[tuple[str, float, int]]) -> None:
        wandb = getattr(monitor, "wandb_monitor", None)  # monitor/monitor.py: MonitorMaster keeps one of each kind
        if wandb is None or self._samples is None:
            monitor.write_events(scalars)
            return
        for each in (monitor.tb_monitor, monitor.csv_monitor, monitor.comet_monitor):
            if each is not None:
                each.write_events(scalars)
        wandb.write_events([(name, value, self._samples()) for name, value, _ in scalars])

    @property
    def position(self) -> int:
        """Bytes of the file so far: to be kept with a checkpoint, for `truncate_to`. 0 without a file."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def mark(self, position: int | None = None) -> str:
        """A digest of the last bytes before `position` (None: before the end): whether a position belongs to this very file. Empty
        without a file."""
        if self.path is None or not self.path.exists():
            return ""
        end = self.position if position is None else position
        with self.path.open("rb") as file:
            file.seek(max(end - _MARKED_BYTES, 0))
            return hashlib.sha256(file.read(min(end, _MARKED_BYTES))).hexdigest()[:16]

    def truncate_to(self, position: int, mark: str = "", *, copy: Path | None = None) -> Path | None:
        """Drop the records after `position`, which a run that resumes from that checkpoint lives through again.

        Args:
            position: bytes, of the property `position` when the checkpoint was saved.
            mark: of the method `mark` then; empty: not known.
            copy: where what is dropped is kept; a name with a number where that one is taken. None: nowhere.

        Returns: the file in which it is kept, None where nothing is.

        Warns and changes nothing where the file can't be the one of which `position` was taken (too short, no line ends there, other bytes
        in front), or where the copy can't be written.
        """
        assert position >= 0, position
        if self.path is None or position == self.position:
            return None
        try:
            with self.path.open("a+b") as file:
                file.seek(max(position - 1, 0))
                fits = position <= self.position and (position == 0 or file.read(1) == b"\n")
                if not fits or (mark and mark != self.mark(position)):
                    text = (
                        f"smartfrz: the log {self.path} is not the one of this checkpoint (no event ends at byte {position}): left as it is"
                    )
                    warnings.warn(text, RuntimeWarning, stacklevel=2)
                    return None
                file.seek(position)
                kept = None if copy is None else _keep(copy, file.read())
                file.truncate(position)
                os.fsync(file.fileno())
                return kept
        except OSError as error:
            text = f"smartfrz: the log {self.path} could not be cut back to the checkpoint, it goes on behind what was there: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return None


def _keep(path: Path, data: bytes) -> Path:
    """Write `data` to a file that isn't there yet: `path`, or the first free one with a number in its name."""
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


def read_events(path: str | Path) -> list[FreezeEvent]:
    """All events of a log, oldest first, without the lines that say how the run stands.

    Warns and raises as `read_log`.
    """
    return [record for record in read_log(path) if isinstance(record, FreezeEvent)]


def read_log(path: str | Path) -> list[Record]:
    """All records of a log, oldest first.

    A torn last line is skipped with a warning; a broken line before it is a ValueError that says which.
    """
    data = Path(path).read_bytes()
    whole = _whole_lines(data)
    if whole < len(data):
        warnings.warn(f"{path}: skipped the torn last line ({len(data) - whole} bytes)", RuntimeWarning, stacklevel=2)
    records: list[Record] = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        record = _parse(line)
        if record is None:
            raise ValueError(f"{path}, line {number}: not a freeze event: {line[:80]!r}")
        records.append(record)
    return records


def is_log(path: Path) -> bool:
    """Whether a file begins like a log, or is one. Cheap."""
    with path.open("rb") as file:
        first = file.readline()
    return (_parse(first) is not None) if first.endswith(b"\n") else first.startswith(_FIRST_BYTES)


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


def _parse(line: bytes) -> Record | None:
    try:
        data = json.loads(line)
        kinds: dict[str, type[RunStart] | type[Status]] = {"start": RunStart, "status": Status}
        return kinds.get(data["kind"], FreezeEvent).from_json(data)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        return None


def _plain(record: Any) -> dict[str, Any]:
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _scalars(record: Record) -> list[tuple[str, float, int]]:
    """(name, value, step) as DeepSpeed's monitors take them; bytes are those of all ranks."""
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
    return [(name, value, record.step) for name, value in values.items() if _finite(value) is not None and value is not None]
