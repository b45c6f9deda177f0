"""A run, reconstructed from its log."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from .events import FreezeEvent, Record, RunStart, Status, is_log, read_log
from .outcome import Stages, outcome


@dataclass(kw_only=True)
class RecordedRun:
    """One run of a log, resumed or not. All records are in order of time.

    Attributes:
        starts: One for each process that trained and for each return to a checkpoint; empty in logs of versions without start lines.
        events: All events, those undone by a rollback included.
        statuses: The status lines, without those undone by a rollback.
        live: All records, without those undone by a rollback.
        resumes: How often the run continued in a new process.
        rollbacks: How often it returned to an earlier checkpoint in the same process.
        last_load: The checkpoint load after the last step, if there was one.
        notes: Remarks on the log itself, for the reader of the report.
    """

    starts: list[RunStart] = field(default_factory=list)
    events: list[FreezeEvent] = field(default_factory=list)
    statuses: list[Status] = field(default_factory=list)
    live: list[Record] = field(default_factory=list)
    resumes: int = 0
    rollbacks: int = 0
    last_load: FreezeEvent | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, front to back. Without a start line: the layers named in the log, in order of appearance."""
        if self.starts:
            return self.starts[-1].layers
        named = {name: None for e in self.events for name in (*e.frozen, *e.layers, *e.probabilities)}
        return tuple(named)

    @property
    def last_step(self) -> int:
        """The last step that the log knows of."""
        last = max((r.step for r in self.live), default=0)
        return max(last, self.last_load.from_step) if self.last_load is not None else last

    @property
    def dry(self) -> bool:
        """Whether the run only recorded decisions."""
        return self.starts[-1].dry_run if self.starts else any(e.dry_run for e in self.events)

    def changes(self) -> list[FreezeEvent]:
        """Return the freezes and thaws, without those undone by a rollback."""
        return [e for e in self.live if isinstance(e, FreezeEvent) and e.kind in ("freeze", "thaw")]

    def _marks(self) -> list[tuple[int, frozenset[str]]]:
        """(step, layers frozen from that step on), oldest first. In a dry run: the layers that would be frozen."""
        if self.dry:
            wanted: set[str] = set()
            marks = []
            for e in self.live:
                wanted |= set(e.layers) if isinstance(e, FreezeEvent) and e.kind == "decision" else set()
                marks.append((e.step, frozenset(wanted)))
            return marks
        changes = set(map(id, self.changes()))
        return [(r.step, frozenset(r.frozen)) for r in self.live if not isinstance(r, FreezeEvent) or id(r) in changes]

    def outcome(self) -> str:
        """Return what froze, or why nothing did: the run's own last statement, else derived from its events."""
        last = self.statuses[-1] if self.statuses else None
        if last is not None and last.outcome and not any(e.step > last.step for e in self.changes()):
            return last.outcome
        start, stages = self.starts[-1] if self.starts else None, Stages()
        for e in self.live:
            if isinstance(e, FreezeEvent) and e.kind in ("freeze", "decision") and e.probabilities:
                stages.judged(e.step, e.layers, e.probabilities, e.reasons)
        return outcome(
            step=self.last_step,
            layers=self.layers,
            frozen=() if self.dry else self.frozen,
            events=[e for e in self.live if isinstance(e, FreezeEvent)],
            policy=start.policy if start and start.policy else "policy",
            stages=stages,
            first_stage=start.first_stage if start else None,
            threshold=start.threshold if start else None,
            total_steps=start.total_steps if start else None,
            dry_run=self.dry,
        )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers that are frozen at the end, in order. In a dry run: that would be frozen."""
        marks = self._marks()
        return tuple(name for name in self.layers if marks and name in marks[-1][1])

    def frozen_spans(self) -> dict[str, list[tuple[int, int]]]:
        """For each layer, the (start, end) steps of its frozen periods. In a dry run: from the first decision on."""
        spans: dict[str, list[tuple[int, int]]] = {name: [] for name in self.layers}
        since: dict[str, int] = {}
        for step, frozen in self._marks():
            for name in frozen - since.keys():
                since[name] = step
            for name in since.keys() - frozen:
                if step > (begun := since.pop(name)):
                    spans.setdefault(name, []).append((begun, step))
        for name, step in since.items():
            spans.setdefault(name, []).append((step, self.last_step))
        return spans


def find_log(run_dir: Path) -> Path:
    """Find the log of a run.

    Args:
        run_dir: The log itself, or a folder with exactly one log among its *.jsonl files or those of its subfolders. Records that a
            resume cut off (NAME.cut-STEP.jsonl) do not count.

    Raises:
        ValueError: There is no log, or more than one.
    """
    if run_dir.is_file():
        return run_dir
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such folder or file")
    for pattern in ("*.jsonl", "*/*.jsonl"):
        found = [p for p in sorted(run_dir.glob(pattern)) if not re.search(r"\.cut-\d+(-\d+)?$", p.stem) and p.is_file() and is_log(p)]
        if len(found) > 1:
            raise ValueError(f"{run_dir} has several logs; name one of them: {', '.join(map(str, found))}")
        if found:
            return found[0]
    raise ValueError(
        f'{run_dir}: no smartfrz log found (a *.jsonl file with at least one event). A run writes one if "log_path" is set in the '
        '"smartfrz" section of its DeepSpeed JSON. A log in another place can be given as a path'
    )


def load_run(path: Path) -> RecordedRun:
    """Load the last run of a log. A resumed run is one run, without the steps that it repeated.

    Raises:
        ValueError: The log has no record.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = read_log(path)
    notes = [str(w.message).removeprefix(f"{path}: ") for w in caught]
    if not records and notes:
        raise ValueError(f"{path}: no line of this file is a record of this package: {notes[0]}")
    if not records:
        raise ValueError(f"{path}: the log is empty: the run has not written a complete line yet")
    lines: list[Record] = []
    earlier = 0
    back: int | None = None  # the step of a checkpoint loaded into the running run, until training continues
    for record in records:
        if isinstance(record, FreezeEvent) and record.goes_back:
            back = record.step
        elif isinstance(record, RunStart) and record.step == back:
            back = None
        elif lines and record.step < lines[-1].step:
            if isinstance(record, RunStart) and record.step > 0:  # resumed from a checkpoint
                lines = [x for x in lines if x.step <= record.step]
            else:
                earlier, lines, back = earlier + 1, [], None
        elif isinstance(record, RunStart) and record.step == 0 and any(not _at_the_start(x) for x in lines):
            earlier, lines = earlier + 1, []
        lines.append(record)
    if earlier:
        notes.append(f"the file also has {earlier} earlier run{'s' * (earlier > 1)}, not shown in this report")
    run, back = RecordedRun(notes=notes), None
    for record in lines:
        if isinstance(record, RunStart):
            if record.step == back:
                run.rollbacks += 1
                run.live = [x for x in run.live if x.step <= record.step]
            elif run.starts:
                run.resumes += 1
            back = None
        if isinstance(record, FreezeEvent):
            run.events.append(record)
            if record.kind == "load":
                back = record.step if record.goes_back else back
                run.last_load = record
                continue
        if not (isinstance(record, FreezeEvent) and record.kind == "warning"):
            run.last_load = None
        run.live.append(record)
        run.starts = [x for x in run.live if isinstance(x, RunStart)]
    run.statuses = [x for x in run.live if isinstance(x, Status)]
    if not run.statuses:
        run.notes.append("there are no status lines, so no losses, times and bytes are shown (an old log, or a run that has just started)")
    return run


def _at_the_start(record: Record) -> bool:
    """Whether a line may precede the first start: warnings at attach, manual changes before the first step."""
    return isinstance(record, FreezeEvent) and record.step == 0
