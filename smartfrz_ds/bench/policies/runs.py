"""The runs of `smartfrz bench policies`: made from tasks and policies, and named after everything that their results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.config.shares import percent_of, steps_of
from smartfrz_ds.predictor.model import DEFAULT_PREDICTOR

from .files import FULL, ONE, Entry, PoliciesFile, Section, TaskFile

MIN_STEPS = 10  # the shortest training that a task file allows


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: everything that its result depends on, except the code.

    Attributes:
        task: Name of the task.
        settings: The task.
        section: The complete "smartfrz" section, resolved and checked.
        seed: Of weights, batches and policies.
        zero_stage: ZeRO stage of the engine.
        predictor: SHA-256 digest of the predictor's file, "" where the policy has none.
    """

    task: str
    settings: TaskFile
    section: Section
    seed: int
    zero_stage: int
    predictor: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable dict of all fields: two jobs with equal dicts are the same run."""
        return {
            "task": self.task,
            "settings": self.settings.training_settings(),
            "section": self.section,
            "seed": self.seed,
            "zero_stage": self.zero_stage,
            "predictor": self.predictor,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Rebuild a job from `to_json`'s output."""
        return cls(**{**data, "settings": TaskFile.model_validate(data["settings"])})

    @property
    def name(self) -> str:
        """Name of its result: task/policy-digest-seed."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}/{self.section['policy']}-{digest}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A job and its place in the benchmark. Two of them may share a job, which then runs once.

    Attributes:
        entry: Name of the entry in the policies file, or "full", "matched", "matched-time".
        label: "one", or the label of the setting in the curve; of a matched run its number of steps.
        job: The run.
        full_steps: Steps of the task: more than the job's in a matched run.
    """

    entry: str
    label: str
    job: Job
    full_steps: int


def plan_runs(
    tasks: Mapping[str, TaskFile], policies: PoliciesFile, *, only: Sequence[str] = (), seeds: int | None = None, source: str = "policies"
) -> list[PlannedRun]:
    """List all runs, the first seed of all settings first.

    Args:
        tasks: Tasks by name.
        policies: The policies file.
        only: Names of entries; empty: all. Training without freezing is always included.
        seeds: Maximum number of seeds.
        source: Name of the policies file, for messages.

    Raises:
        ValueError: An unknown entry, or settings that a run would refuse, with file, entry, label, key, value and what is allowed.
    """
    unknown = [name for name in only if name not in policies.policies]
    if unknown:
        raise ValueError(f"--policy: got {unknown[0]!r}; allowed: {', '.join(policies.policies)}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds: got {seeds}; allowed: an integer >= 1")
    entries = {name: entry for name, entry in policies.policies.items() if not only or name in only}
    most = max(entry.seeds for entry in entries.values())
    entries = {FULL: Entry(policy="manual", seeds=most, one={}), **entries}
    planned = []
    for seed in range(min(most, seeds or most)):
        for task, settings in tasks.items():
            for name, entry in entries.items():
                for label, own in _settings_of(entry).items():
                    if seed < min(entry.seeds, settings.seeds or entry.seeds) and _wanted(settings, name, label):
                        where = f"{source}: policies.{name}.{label if label == ONE else f'curve.{label}'}"
                        section = resolve(policies.common, own, entry.policy or name, settings.steps, seed, where)
                        job = Job(
                            task=task,
                            settings=settings,
                            section=section,
                            seed=seed,
                            zero_stage=policies.zero_stage,
                            predictor=_predictor_of(section),
                        )
                        planned.append(PlannedRun(entry=name, label=label, job=job, full_steps=settings.steps))
    return planned


def _wanted(task: TaskFile, name: str, label: str) -> bool:
    chosen = task.entries is None or name == FULL or name in task.entries or f"{name} {label}" in task.entries
    return chosen and f"{name} {label}" not in task.leave_out


def matched_steps(steps: int, share: float) -> int:
    """Return the length of full training with this share of the cost of `steps` steps, in [MIN_STEPS, steps]."""
    return max(min(MIN_STEPS, steps), min(steps, round(steps * share)))


def matched_run(full: Job, common: Section, steps: int, entry: str) -> PlannedRun:
    """Plan full training with a shorter schedule: warm-up and decay are shares of the shorter run.

    Args:
        full: Training without freezing, with the same task and seed.
        common: Settings of all runs.
        steps: Length of the run.
        entry: "matched" or "matched-time".
    """
    settings = full.settings.model_copy(update={"steps": steps})
    section = resolve(common, {}, "manual", steps, full.seed, entry)
    return PlannedRun(entry=entry, label=str(steps), job=replace(full, settings=settings, section=section), full_steps=full.settings.steps)


def resolve(common: Section, own: Section, policy: str, steps: int, seed: int, where: str) -> Section:
    """Make the complete, checked "smartfrz" section of a run.

    Args:
        common: Settings of all runs.
        own: Settings of this run, which take precedence.
        policy: Name of the policy.
        steps: Length of the run, for percentages.
        seed: Replaces the word "seed".
        where: Source of the settings, for messages.

    Raises:
        ValueError: As `FreezeConfig.load`, with `where`.
    """
    merged: Section = {"policy": policy, "total_steps": steps}
    for part in (common, own):
        for key, value in part.items():
            old = merged.get(key)
            merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    section: Section = _resolved(merged, steps, seed)
    try:
        config = FreezeConfig.load({SECTION: section})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    # The policy's own settings with their defaults: a changed default makes another run.
    own = {} if config.is_own_policy else config.chosen_settings
    return section | ({config.policy: own} if own else {})


def _resolved(value: Any, steps: int, seed: int) -> Any:
    if isinstance(value, dict):
        return {key: _resolved(inner, steps, seed) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, steps, seed) for inner in value]
    if value == "seed":
        return seed
    percent = percent_of(value)
    return value if percent is None else steps_of(percent, steps)


def _settings_of(entry: Entry) -> dict[str, Section]:
    return ({} if entry.one is None else {ONE: entry.one}) | entry.curve


def _predictor_of(section: Section) -> str:
    if section["policy"] != "attention":
        return ""
    return _file_digest(Path(section.get("attention", {}).get("predictor") or DEFAULT_PREDICTOR))


@cache
def _file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
