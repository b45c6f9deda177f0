"""The YAML files of `smartfrz bench policies`: tasks, policies with their settings, and the list of runs that they make.

A task file says what is trained; policies.yaml says which policies train it, with which settings. Settings are the keys of the
"smartfrz" section, the same for all tasks: steps are written as a share of the run ("10%"), and the word "seed" stands for the run's seed.
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
ONE = "one"  # the label of the one setting for all tasks

Section = dict[str, Any]
Count = Annotated[int, Field(ge=1)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TaskFile(_File):
    """One task. Its name is the file's.

    net, data: which network on which data. width, depth: channels of a network that isn't pretrained, and its blocks. length: tokens of a
    text. batch, steps: of the training. lr: the highest learning rate of AdamW, after the warm-up; schedule: what comes then. warmup:
    share of the run. pretrain_steps: training on the first five classes before; with data "mnist-half" and no other. held_out: images or
    texts (GPT: pieces of `length` characters) that are measured at the end.
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
    """Labels of a curve's settings: YAML reads 0.8 as a number."""
    return {str(label): settings for label, settings in value.items()} if isinstance(value, dict) else value


class Entry(_File):
    """A policy in the bench. seeds: 0 .. seeds - 1 are run. policy: whose rule, where the entry has another name. one: the one setting for
    all tasks. curve: settings, by label, whose results make a curve over the saved FLOPs."""

    policy: str | None = None
    seeds: Count
    one: Section | None = None
    curve: Annotated[dict[str, Section], BeforeValidator(_labels)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_settings(self) -> Entry:
        if self.one is None and not self.curve:
            raise ValueError("one: got nothing, and no curve; allowed: a mapping of settings, {} for the defaults")
        if ONE in self.curve:
            raise ValueError(f"curve: got a setting with the label {ONE!r}; allowed: any other label")
        return self


class PoliciesFile(_File):
    """Which policies, how. zero_stage: of the engine. common: settings of every run, full training too. policies: by name."""

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
    """Raises ValueError that names the file, and for each problem key, value and what is allowed."""
    return _read(file, TaskFile)


def read_policies(file: Path) -> PoliciesFile:
    """Raises: as `read_task`. The policies' own settings are checked when the runs are made of them (`plan`)."""
    return _read(file, PoliciesFile)


def find_tasks(names: Iterable[str] = ()) -> dict[str, TaskFile]:
    """Tasks by name. names: of shipped tasks, or paths of task files; none: all that are shipped.

    Raises ValueError for an unknown name, for two tasks of one name, and as `read_task`.
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
            raise ValueError(f"--task: two files are called {file.stem!r}; allowed: one task of a name")
        tasks[file.stem] = read_task(file)
    return tasks


# --- the runs --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: everything that its result depends on, but the code. section: the "smartfrz" section, whole, resolved and checked."""

    task: str
    settings: TaskFile
    section: Section
    seed: int
    zero_stage: int
    predictor: str  # sha256 of the predictor's file, "" where the policy has none

    def to_json(self) -> dict[str, Any]:
        """JSON-able, and all of it: two jobs with the same are one run."""
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
        return cls(**{**data, "settings": TaskFile.model_validate(data["settings"])})

    @property
    def name(self) -> str:
        """Of its result: task/policy-digest-seed."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}/{self.section['policy']}-{digest}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run and what it is in the bench. entry: its name in policies.yaml, or "full". label: "one", or the curve's label of the setting.

    Two of them may share a job, which then runs once.
    """

    entry: str
    label: str
    job: Job


def plan(
    tasks: Mapping[str, TaskFile], policies: PoliciesFile, *, only: Sequence[str] = (), seeds: int | None = None, source: str = "policies"
) -> list[Planned]:
    """All runs, so ordered that the first seed of everything comes first.

    only: names of entries, none: all; full training always runs. seeds: at most so many. source: the policies' file, for messages.

    Raises ValueError: an unknown entry; settings that a run would refuse, with file, entry, label, key, value and what is allowed.
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
                        planned.append(Planned(entry=name, label=label, job=job))
    return planned


def resolve(common: Section, own: Section, policy: str, steps: int, seed: int, where: str) -> Section:
    """The "smartfrz" section of a run: common settings, over them its own; shares turned into steps, "seed" into the seed, the
    policy's defaults filled in; checked.

    steps: of the run. where: what the settings are, for the message. Raises ValueError: as `FreezeConfig.load`, with `where`.
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
    # The policy's own settings with their defaults: where a default changes, it is another run.
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
    """YAML as people write it: 1e-3 is a number, and a key that stands there twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice; allowed: once")
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
            lines.append(f"{path}: missing; it is needed")
        else:
            lines.append(f"{path}: got {item['input']!r}; allowed: {_lower(item['msg'])}")
    return lines


def _lower(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Input should ")
