"""`smartfrz.schedule`: phases of a run, each with the layers that it freezes and thaws, and the steps at which they begin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .sections import OR_SHARE, Patterns, Section, Steps, setting
from .shares import percent_of, steps_of

EXPRESSION = "re:"
"""How a name begins that is a regular expression instead of a glob."""
_KEY = "smartfrz.schedule"


class PhaseSettings(Section):
    """One phase: when it begins, and what it changes. Phases begin in the order of the list."""

    begin: Steps | None = setting(
        None,
        f"an integer >= 0, {OR_SHARE}, or null",
        "The number of steps after which the phase begins; 0: before the first. With `plateau`: when it begins at the latest.",
    )
    epoch: float | None = setting(None, "a number >= 0, or null", "Instead of `begin`: the number of epochs. Requires `epochs`.", ge=0)
    plateau: str | None = setting(
        None,
        "a name, or null",
        "The phase begins when this metric (lower is better; `loss`, or one that is reported with `observe`) no longer falls.",
        min_length=1,
    )
    patience: int = setting(3, "an integer >= 1", "Freezing stages in a row without a new best mean of the metric.", ge=1)
    tolerance: float = setting(
        0.01, "a number in [0, 1)", "A mean is a new best if it is lower by more than this share of the best.", ge=0, lt=1
    )
    freeze: Patterns = setting(
        (),
        "a list of name patterns",
        "Layers that freeze: names of layers, globs (`*` matches anything), or `re:` and a regular expression.",
    )
    thaw: Patterns = setting((), "a list of name patterns", "Layers that train again, likewise.")

    @field_validator("freeze", "thaw")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith(EXPRESSION):
                try:
                    re.compile(pattern.removeprefix(EXPRESSION))
                except re.error as error:
                    raise PydanticCustomError("expression", "not a regular expression") from error
        return patterns

    @model_validator(mode="after")
    def _has_a_beginning_and_a_change(self) -> PhaseSettings:
        if self.begin is None and self.epoch is None and self.plateau is None:
            raise ValueError("begin: got null; allowed: an integer or a share here, or one of epoch and plateau")
        if self.begin is not None and self.epoch is not None:
            raise ValueError(f"epoch: got {self.epoch:g} beside begin ({self.begin}); allowed: only one of them")
        if not self.freeze and not self.thaw:
            raise ValueError("freeze: got an empty list, and so has thaw; allowed: at least one name pattern in one of them")
        return self


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class ScheduleSettings(Section):
    """`smartfrz.schedule`: freeze and thaw in phases that are known in advance."""

    phases: Annotated[tuple[PhaseSettings, ...], BeforeValidator(_list_to_tuple)] = setting(
        (), "a list of objects, one for each phase", "The phases, in the order in which they begin."
    )
    from_log: str | None = setting(
        None, "a path, or null", "Instead of `phases`: the log of an earlier run, whose freezes and thaws are repeated.", min_length=1
    )
    epochs: float | None = setting(None, "a number > 0, or null", "Epochs of the run, for phases that begin at an `epoch`.", gt=0)

    @model_validator(mode="after")
    def _has_one_source(self) -> ScheduleSettings:
        if self.phases and self.from_log is not None:
            raise ValueError("from_log: got a path beside phases; allowed: only one of them")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics for whose plateau a phase waits, each once."""
        return tuple(dict.fromkeys(phase.plateau for phase in self.phases if phase.plateau is not None))


def with_steps(settings: ScheduleSettings, total_steps: int | None, *, provisional: bool) -> tuple[tuple[PhaseSettings, ...], list[str]]:
    """Resolve when the phases begin.

    Args:
        settings: The schedule, with its phases.
        total_steps: Length of the run in steps; None: unknown.
        provisional: Whether the length may be unknown for now.

    Returns:
        The phases, whose `begin` is a number of steps (None: only a plateau begins it), and the problems, one line each.
    """
    problems: list[str] = []
    if not settings.phases:
        problems.append(f"{_KEY}.phases: got an empty list; allowed: at least one phase, or a log at {_KEY}.from_log")
    found: list[PhaseSettings] = []
    last = 0
    for number, phase in enumerate(settings.phases):
        key, step = f"{_KEY}.phases[{number}]", _step_of(phase, settings.epochs, total_steps)
        if isinstance(step, str):
            problems += [] if provisional and total_steps is None and "length" in step else [f"{key}.{step}"]
            step = None
        if step is not None:
            told = f"begin: got {step}" if isinstance(phase.begin, int) else f"begins at step {step}"
            if step < last:
                problems.append(f"{key}.{told}; allowed: at least {last}, where the phase in front of it begins")
            elif total_steps is not None and step >= total_steps:
                problems.append(f"{key}.{told}, and the run ends at {total_steps}; allowed: less than that")
            last = max(step, last)
        found.append(phase.model_copy(update={"begin": step, "epoch": None}))
    return tuple(found), problems


def _step_of(phase: PhaseSettings, epochs: float | None, total_steps: int | None) -> int | str | None:
    """Return the step at which a phase begins, None if only a plateau begins it, or why it is not known."""
    if isinstance(phase.begin, int):
        return phase.begin
    percent = percent_of(phase.begin)
    if percent == 0 or phase.epoch == 0:
        return 0
    if percent is None and phase.epoch is None:
        return None
    if phase.epoch is not None and epochs is None:
        return f"epoch: got {phase.epoch:g}, and {_KEY}.epochs is null; allowed: the number of epochs of the run at {_KEY}.epochs"
    if total_steps is None:
        told = f"begin: got '{phase.begin}'" if phase.epoch is None else f"epoch: got {phase.epoch:g}"
        return f"{told}, and the length of the run is unknown; allowed: an integer at begin, or one at smartfrz.total_steps"
    return steps_of(percent, total_steps) if percent is not None else round((phase.epoch or 0) * total_steps / (epochs or 1))


def dumped(phases: Sequence[PhaseSettings]) -> list[dict[str, Any]]:
    """Return phases as they stand in a settings file, without the keys that have their defaults."""
    return [phase.model_dump(mode="json", exclude_defaults=True) for phase in phases]
