"""The YAML files of `smartfrz bench policies`: tasks, policies with their settings, and the list of runs made from them.

A task file defines a training; policies.yaml lists the policies and their settings. Settings are the keys of the "smartfrz" section, the
same for all tasks: steps are percentages of the run ("10%"), and the word "seed" is replaced by the run's seed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.config.shares import percent_of, steps_of
from smartfrz_ds.predictor.model import DEFAULT_PREDICTOR

from .nets import DATA_OF, DataKind, NetKind

HERE = Path(__file__).parent
TASKS = HERE / "tasks"
POLICIES_FILE = HERE / "policies.yaml"
FULL = "full"  # the name of training without freezing
ONE = "one"  # the label of the single setting for all tasks

Section = dict[str, Any]
Count = Annotated[int, Field(ge=1)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TaskFile(_File):
    """One task, named after its file.

    Attributes:
        net: The network.
        data: The data it is trained on.
        width: Channels of a network that is not pretrained.
        depth: Its number of blocks.
        length: Tokens per text.
        batch: Samples per step.
        steps: Length of the training.
        lr: The highest learning rate of AdamW, after the warm-up.
        weight_decay: Of AdamW.
        schedule: The learning-rate schedule after the warm-up.
        warmup: Fraction of the run.
        pretrain_steps: Steps of pretraining on the first five classes; only with data "mnist-half".
        held_out: Number of images or texts (GPT: windows of `length` characters) for the evaluation at the end.
    """

    net: NetKind
    data: DataKind
    width: Count = 32
    depth: Count = 6
    length: Count = 32
    batch: Count
    steps: Annotated[int, Field(ge=10)]
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["linear", "cosine", "constant"]
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    pretrain_steps: Annotated[int, Field(ge=0)] = 0
    held_out: Annotated[int, Field(ge=1, le=4000)]

    @model_validator(mode="after")
    def _fits(self) -> TaskFile:
        if self.data not in DATA_OF[self.net]:
            raise ValueError(f"data: got {self.data!r}; allowed with net {self.net!r}: {', '.join(map(repr, DATA_OF[self.net]))}")
        if (self.data == "mnist-half") != (self.pretrain_steps > 0):
            allowed = "an integer >= 1" if self.data == "mnist-half" else "0"
            raise ValueError(f"pretrain_steps: got {self.pretrain_steps}; allowed with data {self.data!r}: {allowed}")
        if self.net in ("vit", "gpt") and self.width % 4:
            raise ValueError(f"width: got {self.width}; allowed with net {self.net!r}: a multiple of 4, the number of heads")
        return self


def _labels(value: object) -> object:
    """Convert the labels of a curve's settings to text: YAML reads 0.8 as a number."""
    return {str(label): settings for label, settings in value.items()} if isinstance(value, dict) else value


class Entry(_File):
    """One entry of the policies file.

    Attributes:
        policy: Name of the policy, if the entry has another name.
        seeds: Seeds 0 .. seeds - 1 are run.
        one: The single setting for all tasks.
        curve: Settings by label, whose results make a curve over the saved FLOPs.
    """

    policy: str | None = None
    seeds: Count
    one: Section | None = None
    curve: Annotated[dict[str, Section], BeforeValidator(_labels)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_settings(self) -> Entry:
        if self.one is None and not self.curve:
            raise ValueError("one: got nothing, and there is no curve; allowed: a mapping of settings, {} for the defaults")
        if ONE in self.curve:
            raise ValueError(f"curve: got a setting with the label {ONE!r}; allowed: any other label")
        return self


class PoliciesFile(_File):
    """The policies file.

    Attributes:
        zero_stage: ZeRO stage of the engines.
        common: Settings of every run, training without freezing included.
        policies: The entries by name.
    """

    zero_stage: Literal[0, 1] = 0
    common: Section = Field(default_factory=dict)
    policies: dict[str, Entry] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> PoliciesFile:
        if FULL in self.policies:
            raise ValueError(f"policies: got {FULL!r}, which always runs; allowed: any other name")
        return self


FileT = TypeVar("FileT", bound=_File)


def read_task(file: Path) -> TaskFile:
    """Read a task file.

    Raises:
        ValueError: Names the file, and for each problem the key, the value and what is allowed.
    """
    return _read(file, TaskFile)


def read_policies(file: Path) -> PoliciesFile:
    """Read a policies file. The policies' own settings are checked by `plan_runs`.

    Raises:
        ValueError: As `read_task`.
    """
    return _read(file, PoliciesFile)


def find_tasks(names: Iterable[str] = ()) -> dict[str, TaskFile]:
    """Find tasks by name.

    Args:
        names: Names of shipped tasks, or paths of task files. Empty: all shipped tasks.

    Raises:
        ValueError: An unknown name, two tasks with the same name, or as `read_task`.
    """
    shipped = {file.stem: file for file in sorted(TASKS.glob("*.yaml"))}
    files = []
    for name in names:
        file = shipped.get(name, Path(name))
        if name not in shipped and not file.is_file():
            raise ValueError(f"--task: got {name!r}; allowed: {', '.join(shipped)}, or the path of a YAML file")
        files.append(file)
    tasks: dict[str, TaskFile] = {}
    for file in dict.fromkeys(files or shipped.values()):
        if file.stem in tasks:
            raise ValueError(f"--task: two files are named {file.stem!r}; allowed: one task per name")
        tasks[file.stem] = read_task(file)
    return tasks


# --- the runs --------------------------------------------------------------------------------------------------------------------


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
            "settings": self.settings.model_dump(mode="json"),
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
        entry: Name of the entry in the policies file, or "full".
        label: "one", or the label of the setting in the curve.
        job: The run.
    """

    entry: str
    label: str
    job: Job


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
                    if seed < entry.seeds:
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
                        planned.append(PlannedRun(entry=name, label=label, job=job))
    return planned


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
    own = config.policy_settings
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


# --- YAML ------------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which 1e-3 is a number and a duplicate key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: duplicate key {key.value!r}; allowed: once")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _read(file: Path, kind: type[FileT]) -> FileT:
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
        if not isinstance(data, dict):
            raise ValueError(f"got {data!r}; allowed: a mapping with the keys {', '.join(kind.model_fields)}")
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError("\n".join(f"{file}: {line}" for line in _problems(error, kind))) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from None


def _problems(error: ValidationError, kind: type[_File]) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "value_error":
            lines.append(f"{path}{'.' if path else ''}{item['ctx']['error']}")
        elif item["type"] == "extra_forbidden":
            inner = kind if len(item["loc"]) == 1 else Entry
            lines.append(f"{path}: unknown key, got {item['input']!r}; allowed: {', '.join(inner.model_fields)}")
        elif item["type"] == "missing":
            lines.append(f"{path}: missing; allowed: a value, the key is required")
        else:
            lines.append(f"{path}: got {item['input']!r}; allowed: {_lower(item['msg'])}")
    return lines


def _lower(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Input should ")
