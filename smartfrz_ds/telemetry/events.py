"""The records of a run's log, and how to read them: one typed record per line of a JSONL file.

A line counts once its newline has been written. A crash can only leave a torn last line, which readers skip. event_log.py writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

FIRST_BYTES = b'{"kind": "'
"""How every line of a log begins."""
WEIGHTS_ONLY = ", weights only"
"""The end of a "load" event's message where only the weights were loaded."""
EventKind = Literal["freeze", "thaw", "decision", "warning", "rebalance", "load", "undone", "cache"]


@dataclass(frozen=True, kw_only=True)
class FreezeEvent:
    """One event at a step boundary.

    Attributes:
        kind: "freeze" and "thaw" (carried out), "decision" (of a policy, without a freeze), "warning", "rebalance" (layers of a pipeline
            moved to other stages), "load" (a checkpoint was loaded into the running run; see run_log.py), "undone" (a change failed
            on some rank, and every rank was brought back to the previous layout) or "cache" (the prefix cache is on, proven, off, or what
            it has brought so far).
        step: Successful optimizer steps so far, >= 0. For a "load", those of the checkpoint.
        layers: The layers concerned, in order. For a "load", those whose frozen state it changed.
        frozen: All frozen layers after the event, in order.
        probabilities: For each judged layer, the probability that it has converged, in [0, 1]. NaN is kept (null in the file).
        reasons: For each judged layer, one short line.
        bytes_released: Bytes of optimizer state, master weights included, that this rank released; negative for a thaw that reallocates.
        bytes_released_total: The same, summed over all ranks.
        seconds: Wall time for which training stood still.
        predicted_seconds: The prediction made just before a freeze (backends/cost.py); 0 where none was made.
        moved_bytes: Bytes sent between ranks, over all ranks.
        dry_run: Whether the run only records decisions.
        message: The text of a warning or about the prefix cache, the checkpoint that was loaded, or why a change was undone.
        bounds: Stage bounds in the pipeline's list of layers after a rebalance.
        gain: Predicted speed-up of a step after a rebalance; 1 where no costs were known.
        from_step: The step at which a "load" took place, else 0.
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
        """Whether the run continues from the loaded checkpoint. False where only its weights were loaded."""
        return self.kind == "load" and not self.message.endswith(WEIGHTS_ONLY)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable dict. A probability that is not finite becomes null."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        data["layers"], data["frozen"], data["reasons"] = list(self.layers), list(self.frozen), dict(self.reasons)
        data["bounds"] = list(self.bounds)
        data["probabilities"] = {name: float(p) if math.isfinite(p) else None for name, p in self.probabilities.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FreezeEvent:
        """Rebuild an event from `to_json`'s output.

        Raises:
            TypeError, KeyError, AttributeError: `data` is not such a record.
        """
        probabilities = {name: math.nan if p is None else p for name, p in data["probabilities"].items()}
        tuples = {key: tuple(data.get(key, ())) for key in ("layers", "frozen", "bounds")}
        return cls(**{**data, **tuples, "probabilities": probabilities})


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """The start of a process's training: the first line of a run, and one more after each checkpoint load.

    Attributes:
        step: 0, or the checkpoint's step.
        time: Seconds since 1970.
        layers: Names of all layers, front to back.
        kinds: "embedding", "block" or "head", one per layer.
        weights: Number of weights, one per layer; 0 where the user froze them.
        frozen: Layers that are frozen at that moment.
        policy: Name of the policy.
        engine: Name of the backend.
        version: Version of this package.
        ranks: Number of ranks.
        total_steps: Length of the whole run in steps; None where unknown.
        dry_run: Whether the run only records decisions.
        first_stage: Step of the first freezing stage; None where no policy decides, or where it is unknown.
        threshold: The policy's threshold, of the probability that it gives or of its own measure; None where it has none, or unknown.
        entries: In a pipeline: for each layer, its first entry in the pipeline's list of layers. Empty without one.
        bounds: In a pipeline: the bounds of its stages in that list, (stages + 1,). Empty without one.
        optimizer_bytes: As in `Status`, before the first step; None where unknown.
        gradient_bytes: As in `Status`, before the first step; None where unknown.
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
    threshold: float | None = None
    entries: tuple[int, ...] = ()
    bounds: tuple[int, ...] = ()
    optimizer_bytes: int | None = None
    gradient_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable dict, `kind` first."""
        return {"kind": "start"} | _plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunStart:
        """Rebuild a record from `to_json`'s output.

        Raises:
            TypeError, KeyError: `data` is not such a record.
        """
        lists = {name: tuple(data[name]) for name in ("layers", "kinds", "weights", "frozen")}
        lists |= {name: tuple(data.get(name, ())) for name in ("entries", "bounds")}
        return cls(**{key: value for key, value in data.items() if key != "kind"} | lists)


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of the run after a step, every `status_interval` steps. None means unknown.

    Attributes:
        step: Successful optimizer steps so far.
        time: Seconds since 1970.
        loss: Mean of the losses passed to backward since the last status, over micro-batches and ranks; else the latest
            `observe(loss=…)`.
        step_seconds: Median since the last status, from the end of one step to the end of the next, without this package's hooks.
        frozen: The frozen layers after this step.
        optimizer_bytes: Bytes of optimizer state and separate master weights, over all ranks.
        gradient_bytes: Bytes of gradients that all ranks together pass to reductions in a step.
        saved_flops_fraction: Fraction of the training FLOPs so far, forward and backward, that freezing saved.
        hours_saved: (Median step without frozen layers - step with frozen layers) × steps, minus this package's own time.
        lr: The highest learning rate of the parameter groups, for the next step.
        metrics: The latest observed values.
        usual_seconds: Median over the steps without frozen layers so far.
        outcome: What froze so far, or why nothing did, as text.
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
        """Return a JSON-serializable dict, `kind` first. A number that is not finite becomes null."""
        data = {"kind": "status"} | _plain(self) | {"metrics": {name: finite(value) for name, value in self.metrics.items()}}
        return {key: finite(value) if isinstance(value, float) else value for key, value in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Status:
        """Rebuild a record from `to_json`'s output.

        Raises:
            TypeError, KeyError: `data` is not such a record.
        """
        return cls(**{key: value for key, value in data.items() if key != "kind"} | {"frozen": tuple(data["frozen"])})


Record = FreezeEvent | RunStart | Status


def read_events(path: str | Path) -> list[FreezeEvent]:
    """Read the events of a log, oldest first, without start and status lines.

    Args:
        path: The JSONL file.
    """
    return [record for record in read_log(path) if isinstance(record, FreezeEvent)]


def read_log(path: str | Path) -> list[Record]:
    """Read all records of a log, oldest first. A torn last line and foreign or damaged lines are skipped with a warning.

    Args:
        path: The JSONL file.
    """
    data = Path(path).read_bytes()
    whole = whole_lines(data)
    if whole < len(data):
        warnings.warn(f"{path}: skipped the torn last line ({len(data) - whole} bytes)", RuntimeWarning, stacklevel=2)
    lines = data[:whole].splitlines()
    parsed = [parse(line) for line in lines]
    foreign = [i for i, record in enumerate(parsed) if record is None]
    if foreign:
        first = foreign[0]
        text = f"skipped line {first + 1}, which is not a record of this package: {lines[first][:80]!r}"
        more = f" ({len(foreign) - 1} more such lines)" if len(foreign) > 1 else ""
        warnings.warn(f"{path}: {text}{more}", RuntimeWarning, stacklevel=2)
    return [record for record in parsed if record is not None]


def is_log(path: Path) -> bool:
    """Whether a record is among the first lines of a file. Reads 20 lines at most."""
    with path.open("rb") as file:
        first = [line for line in (file.readline() for _ in range(20)) if line]
    return any((parse(line) is not None) if line.endswith(b"\n") else line.startswith(FIRST_BYTES) for line in first)


def whole_lines(data: bytes) -> int:
    """Length of `data` without a torn last line: one without a newline or, after a power failure, with bytes missing inside."""
    if not data:
        return 0
    last = data.rfind(b"\n", 0, len(data) - 1) + 1
    return len(data) if data.endswith(b"\n") and parse(data[last:]) is not None else last


def parse(line: bytes) -> Record | None:
    """Parse one line; None where it is not one."""
    try:
        data = json.loads(line)
        kinds: dict[str, type[RunStart] | type[Status]] = {"start": RunStart, "status": Status}
        return kinds.get(data["kind"], FreezeEvent).from_json(data)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        return None


def _plain(record: Any) -> dict[str, Any]:
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None
