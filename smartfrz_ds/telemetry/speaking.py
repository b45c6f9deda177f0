"""Connects a controller to its log lines (voice.py) and to the sentence about its outcome (outcome.py)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.layers import Layer

from .events import FreezeEvent
from .outcome import Stages, outcome
from .run_log import RunLog
from .voice import Voice, event_text, start_text
from .words import layer_names, matched, some


class RunView(Protocol):
    """The part of a run that telemetry reads; the runtime's `RunContext` provides it.

    Attributes:
        config: The settings.
        backend: The engine's backend.
        ranks: The collectives of all ranks.
        total_steps: Length of the run in steps; None where unknown.
        metrics: The newest value of each observed metric.
    """

    config: FreezeConfig
    backend: Backend
    ranks: Collectives
    total_steps: int | None
    metrics: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers, front to back."""
        ...

    @property
    def step(self) -> int:
        """Successful optimizer steps so far."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen layers, front to back."""
        ...

    @property
    def any_frozen(self) -> bool:
        """Whether there are any."""
        ...

    @property
    def first_stage(self) -> int | None:
        """Step of the first freezing stage, None where there is none."""
        ...

    @property
    def threshold(self) -> float | None:
        """The probability from which the policy freezes a layer, None where it has no such number."""
        ...


class Speaker:
    """Log what one controller does. Created on every rank; only rank 0 writes lines.

    Args:
        run: The run.
        log: The run's record.
        layers: All layers, front to back.
        saved: Returns the fraction of the training FLOPs saved so far, in [0, 1].
    """

    def __init__(self, run: RunView, log: RunLog, layers: Sequence[Layer], saved: Callable[[], float]) -> None:
        self._run, self._log, self._layers, self._saved = run, log, layers, saved
        self._voice = Voice(run.backend.rank == 0)
        self.stages = Stages()
        self.length_from = ""  # source of the length of the run
        self._started = self._ended = not run.config.enabled  # disabled: exists only because a checkpoint has frozen layers
        self._held: list[str] = []
        self.cache_note: Callable[[], str] = str  # returns what the prefix cache has brought, or why it is not used
        log.on_cut = self._log_was_cut
        self._voice.at_exit(self)

    def start(self) -> None:
        """Write the first line, and the lines that waited for it. Call when the length of the run is known, or known to be unknown."""
        run = self._run
        if not self._started:
            self._started = True
            self._voice.say(
                start_text(
                    engine=run.backend.name,
                    ranks=run.ranks.count,
                    policy=run.config.policy,
                    layers=run.names,
                    own=sum(not layer.numel and not layer.is_borrower for layer in self._layers),
                    length=self._length(),
                    total_steps=run.total_steps,
                    first_stage=run.first_stage,
                    log=_log(self._log.path, self._log.wanted_path),
                    dry_run=run.config.dry_run,
                )
            )
            if run.total_steps is None and run.config.total_steps == "auto" and run.config.policy != "manual":
                self._voice.say(
                    "the length of the run is unknown: neither a scheduler nor a Trainer defines it, so the policy cannot tell how much "
                    f'training remains. Set "total_steps" in the "{SECTION}" section to the number of optimizer steps of the whole run, or '
                    "to null to leave it unknown",
                    level=logging.WARNING,
                )
        held, self._held = self._held, []
        for text in held:
            self._voice.say(text)

    def _length(self) -> str:
        run = self._run
        if run.total_steps is None:
            return "length of the run unknown" + (f" ({SECTION}.total_steps is null)" if run.config.total_steps is None else "")
        return f"{some(run.total_steps, 'step')} ({self.length_from})"

    def event(self, event: FreezeEvent, *, by_policy: bool) -> None:
        """Write the line of an event, if it has one.

        Args:
            event: The event.
            by_policy: Whether the policy decided; False for freeze() and thaw() calls of the user.
        """
        text = event_text(event, self._run.names, policy=self._run.config.policy if by_policy else None)
        if text:
            self._voice.say(text, level=logging.WARNING if event.kind == "undone" else logging.INFO)

    def resumed(self, folder: str, stages: Mapping[str, Any] | None) -> None:
        """Report a checkpoint that was loaded before the first step.

        Args:
            folder: The checkpoint's folder, "" where unknown.
            stages: State of its `Stages`, None where it has none.
        """
        run = self._run
        self.stages = Stages.from_state(stages)
        frozen = f": {layer_names(run.frozen, run.names)}" if run.frozen else ""
        source = f" from checkpoint {folder}" if folder else ""
        text = f"goes on at step {run.step:,}{source}; {len(run.frozen)} of {some(len(run.names), 'layer')} frozen{frozen}"
        if self._started:
            self._voice.say(text)
        else:
            self._held = [text]

    def _log_was_cut(self, kept: Path) -> None:
        self._voice.say(f"the log was cut back to the checkpoint; the part behind it is in {kept}")

    def note(self, text: str) -> None:
        """Write any other line."""
        self._voice.say(text)

    def outcome(self) -> str:
        """Say what froze so far, or why nothing did, and what the prefix cache has brought."""
        run, cache = self._run, self.cache_note()
        said = outcome(
            step=run.step,
            layers=run.names,
            frozen=run.frozen,
            events=self._log.events,
            policy=run.config.policy,
            stages=self.stages,
            threshold=run.threshold,
            first_stage=run.first_stage,
            total_steps=run.total_steps,
            dry_run=run.config.dry_run,
        )
        return f"{said}; prefix cache: {cache}" if cache else said

    def end(self) -> None:
        """Write the last line, once, unless the controller took no step."""
        run = self._run
        if self._ended or not self._log.trained:
            return
        self._ended = True
        of = f" of {run.total_steps:,}" if run.total_steps else ""
        share = self._saved()
        saved = f"; {100 * share:.1f} % of the training FLOPs saved: {matched(run.step, share)}" if run.frozen else ""
        self._voice.say(f"end at step {run.step:,}{of}: {self.outcome()}{saved}")

    def __del__(self) -> None:
        # A controller that was dropped without detach(), for example as a local variable of main().
        with contextlib.suppress(Exception):
            self.end()


def scheduler_name(scheduler: Any) -> str:
    """Return a scheduler's name for a log line: its type, or the type of the scheduler that it wraps (Accelerate)."""
    return f"scheduler {type(getattr(scheduler, 'scheduler', scheduler)).__name__}"


def _log(path: Path | None, wanted: Path | None) -> str:
    if path is None:
        return f"no log ({SECTION}.log_path is not set)"
    return f"log {path}" + ("" if path == wanted else f" (another engine of this process writes to {wanted})")
