"""The YAML files of `smartfrz bench policies`: tasks, and policies with their settings.

A task file defines a training; policies.yaml lists the policies and their settings. Settings are the keys of the "smartfrz" section, the
same for all tasks: steps are percentages of the run ("10%"), and the word "seed" is replaced by the run's seed (runs.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .nets import DATA_OF, DataKind, NetKind

HERE = Path(__file__).parent
TASKS = HERE / "tasks"
POLICIES_FILE = HERE / "policies.yaml"
FULL = "full"  # the name of training without freezing
MATCHED = "matched"  # full training, shortened to the FLOPs of a freezing run
MATCHED_TIME = "matched-time"  # full training, shortened to the wall time of a freezing run
ONE = "one"  # the label of the single setting for all tasks

_PRETRAINED_ON_OTHERS = ("mnist-half", "bbc-chars", "bbc-preferences")  # data

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
        pretrain_steps: Steps of pretraining; only with data "mnist-half" (on the first five classes) "bbc-chars" (on "pydoc") and
            "bbc-preferences" (on the same articles).
        train_rows: Number of texts to train on, which is the length of an epoch; 0: all. Only with net "minilm".
        lora_rank: Rank of LoRA adapters, beside which only the head trains; 0: everything trains. With data "bbc", and with
            "bbc-preferences", which needs them.
        held_out: Number of images or texts (GPT: windows of `length` characters) for the evaluation at the end.
        use: "design": the policies and their settings were developed with this task in view; "once": they were not.
        entries: Entries of the policies file that are run, or one setting of an entry, like "attention one"; None: all of them.
        leave_out: Settings that are not run, each as an entry and a label, like "linear 10-60%".
        seeds: Maximum number of seeds; None: as in the policies file.
        seconds_per_step: CPU seconds of a step of full training with one thread, for estimates.
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
    train_rows: Annotated[int, Field(ge=0)] = 0
    lora_rank: Annotated[int, Field(ge=0)] = 0
    use: Literal["design", "once"] = "design"
    entries: list[str] | None = None
    leave_out: list[str] = Field(default_factory=list)
    seeds: Count | None = None
    seconds_per_step: Annotated[float, Field(gt=0)] | None = None

    @property
    def pretrained(self) -> bool:
        """Whether the run starts from trained weights."""
        return self.net == "minilm" or self.pretrain_steps > 0

    def training_settings(self) -> dict[str, Any]:
        """Return the JSON-serializable settings on which a result depends."""
        settings = self.model_dump(mode="json", exclude={"use", "entries", "leave_out", "seeds", "seconds_per_step"})
        # Left out at their defaults, so that results that were made before these keys existed stay valid.
        return {key: value for key, value in settings.items() if value or key not in ("train_rows", "lora_rank")}

    @model_validator(mode="after")
    def _fits(self) -> TaskFile:
        if self.data not in DATA_OF[self.net]:
            raise ValueError(f"data: got {self.data!r}; allowed with net {self.net!r}: {', '.join(map(repr, DATA_OF[self.net]))}")
        if (self.data in _PRETRAINED_ON_OTHERS) != (self.pretrain_steps > 0):
            allowed = "an integer >= 1" if self.data in _PRETRAINED_ON_OTHERS else "0"
            raise ValueError(f"pretrain_steps: got {self.pretrain_steps}; allowed with data {self.data!r}: {allowed}")
        for key, fits in (("train_rows", self.net == "minilm"), ("lora_rank", self.data in ("bbc", "bbc-preferences"))):
            if getattr(self, key) and not fits:
                raise ValueError(f"{key}: got {getattr(self, key)}; allowed with net {self.net!r} and data {self.data!r}: 0")
        if self.net == "gpt2" and not self.lora_rank:
            raise ValueError("lora_rank: got 0; allowed with net 'gpt2': an integer >= 1, since the reference is the network without them")
        if 0 < self.train_rows < self.batch:
            raise ValueError(f"train_rows: got {self.train_rows}; allowed: an integer >= batch ({self.batch}), or 0")
        if self.net in ("vit", "gpt", "gpt2") and self.width % 4:
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
        for name in (FULL, MATCHED, MATCHED_TIME):
            if name in self.policies:
                raise ValueError(f"policies: got {name!r}, which the benchmark adds by itself; allowed: any other name")
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
        names: Names of shipped tasks, or paths of task files. Empty: all shipped tasks that are not optional.

    Raises:
        ValueError: An unknown name, two tasks with the same name, or as `read_task`.
    """
    shipped = {file.stem: file for file in sorted(TASKS.glob("*.yaml"))}
    known = shipped | {file.stem: file for file in sorted((TASKS / "optional").glob("*.yaml"))}
    files = []
    for name in names:
        file = known.get(name, Path(name))
        if name not in known and not file.is_file():
            raise ValueError(f"--task: got {name!r}; allowed: {', '.join(known)}, or the path of a YAML file")
        files.append(file)
    tasks: dict[str, TaskFile] = {}
    for file in dict.fromkeys(files or shipped.values()):
        if file.stem in tasks:
            raise ValueError(f"--task: two files are named {file.stem!r}; allowed: one task per name")
        tasks[file.stem] = read_task(file)
    return tasks


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
