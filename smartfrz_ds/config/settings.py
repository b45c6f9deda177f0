"""The "smartfrz" section of a DeepSpeed JSON: every key with its type, default, range and meaning.

The defaults in docs/configuration.md and the table in its page of the site are generated from this module (table.py).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, JsonValue, PrivateAttr, ValidationError, model_validator

from .own import OR_OWN, PolicyObject, check_own_name, with_object
from .problems import problems
from .reading import read_config, show
from .schedule import ScheduleSettings
from .sections import (
    OR_SHARE,
    AttentionSettings,
    AutoFreezeSettings,
    BandSettings,
    CacheSettings,
    EgeriaSettings,
    FreezeOutSettings,
    FsdpSettings,
    GuardSettings,
    Interval,
    LateSettings,
    LinearSettings,
    ManualSettings,
    Patterns,
    PipelineSettings,
    PipeTransformerSettings,
    PolicyName,
    RandomSettings,
    Section,
    Steps,
    WeightDriftSettings,
    Zero3Settings,
    setting,
)
from .shares import percent_of

SECTION = "smartfrz"
# A mapping without "smartfrz" that contains one of these is a whole DeepSpeed config; none of them is one of our
# keys.
DEEPSPEED_KEYS = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "optimizer", "fp16", "bf16"}
)


class FreezeConfig(Section):
    """The settings of a run. Created with `FreezeConfig.load`; immutable, and identical on every rank (see `digest`)."""

    enabled: bool = setting(True, "true or false", "false: the engine trains as if smartfrz_ds were not installed.")
    dry_run: bool = setting(False, "true or false", "Decide and log, but freeze nothing.")
    policy: PolicyName | Annotated[str, AfterValidator(check_own_name)] = setting(
        "attention",
        f"{', '.join(map(repr, get_args(PolicyName)))}, {OR_OWN}",
        "The policy that decides. Its settings are in the sub-section of the same name, those of a class of your own in "
        "`policy_settings`. The module of such a class is imported: it is code that runs.",
    )
    policy_settings: dict[str, JsonValue] = setting(
        {}, "an object", "Settings of a policy that is not built in: the arguments of its class, by name."
    )
    layers: Literal["auto"] | Annotated[Patterns, Field(min_length=1)] = setting(
        "auto",
        "'auto' or a list of one or more name patterns",
        "The freezable layers, front to back: detected from the model's structure, or listed as name patterns (`*` matches anything). A "
        "pattern that matches inside a layer takes that part out; 'auto' in the list stands for the detected layers.",
    )
    keep_active: Patterns = setting(
        (), "a list of name patterns", "Layers that never freeze: patterns of their names, or of modules inside them."
    )
    order: Literal["front_to_back", "back_to_front", "any"] = setting(
        "front_to_back",
        "'front_to_back', 'back_to_front' or 'any'",
        "front_to_back: a layer freezes only if all layers before it are frozen (only a frozen prefix shortens back-propagation); "
        "back_to_front: only if all layers behind it but the head are; any: no such restriction.",
    )
    tied: Literal["train", "freeze"] = setting(
        "train",
        "'train' or 'freeze'",
        "Weights that a frozen layer shares with an active one. train: they keep training through the active one; freeze: frozen in both.",
    )
    frozen_mode: Literal["eval", "train"] = setting(
        "eval",
        "'eval' or 'train'",
        "Mode of frozen layers. eval: no dropout, running statistics are not updated; train: same as the model.",
    )
    max_frozen_fraction: float = setting(0.75, "a number in (0, 1]", "Largest share of the layers that a policy may freeze.", gt=0, le=1)
    warmup_steps: Steps = setting(
        "10%",
        f"an integer >= 0, {OR_SHARE}",
        "Steps at the start during which no policy freezes anything. The default is 100 if the length of the run is unknown.",
    )
    freeze_interval: Interval = setting(
        "4%",
        f"an integer >= 1 and >= snapshot_interval, {OR_SHARE}",
        "Steps between two freezing stages (the moments of decision). The default is 50 if the length of the run is unknown.",
    )
    cooldown: int = setting(1, "an integer >= 0", "Freezing stages to skip after a freeze.", ge=0)
    snapshot_interval: Interval = setting(
        "0.8%",
        f"an integer >= 1 and <= freeze_interval, {OR_SHARE}",
        "Steps between two snapshots of the sampled weights. The default is 10 if the length of the run is unknown.",
    )
    window: int = setting(30, "an integer >= 2", "Number of recent snapshots of a layer that the policy sees.", ge=2)
    sample_size: int = setting(1024, "an integer >= 1", "Number of weights sampled from each layer; always the same ones.", ge=1)
    probe: int | None = setting(
        None,
        "an integer >= 2, or null",
        "Number of inputs taken from `probe_batch` (an argument of `initialize` and `attach`) for which each layer's output is compared "
        "between freezing stages; null: no probe. At most 128.",
        ge=2,
    )
    total_steps: Literal["auto"] | Annotated[int, Field(ge=1)] | None = setting(
        "auto", "an integer >= 1, 'auto' or null", "Steps of the whole run; auto: read from the scheduler or the Trainer; null: unknown."
    )
    keep_state: Steps = setting(
        0,
        f"an integer >= 0, {OR_SHARE}",
        "Steps for which the optimizer state of a frozen layer is kept in host memory, so that a thaw is exact.",
    )
    seed: int = setting(0, "an integer from 0 to 2^63 - 1", "Seed for the choice of the sampled weights.", ge=0, le=2**63 - 1)
    log_path: str | None = setting(
        None, "a path, or null", "JSONL file to which rank 0 appends one line per event and per status; null: no file.", min_length=1
    )
    status_interval: Interval | None = setting(
        None,
        f"an integer >= 1, {OR_SHARE}, or null",
        "Steps between two statuses (loss, step time, bytes, savings) in the log and the monitor; null: same as `freeze_interval`.",
    )
    gradient_check: Literal["raise", "warn", "off"] = setting(
        "warn",
        "'raise', 'warn' or 'off'",
        "Checks after a freeze that every active parameter still receives its gradient. A graph that is found to be cut is an error. In "
        "doubtful cases (used in a forward, no gradient, no cut found), warn: one warning; raise: an error. off: no check.",
    )
    untested_versions: Literal["check", "allow", "refuse"] = setting(
        "check",
        "'check', 'allow' or 'refuse'",
        "A version of DeepSpeed or torch that was not tested. check: it is checked with a toy model, once, in some seconds; allow: it is "
        "used unchecked; refuse: it is an error.",
    )
    attention: AttentionSettings = setting(AttentionSettings(), "an object", "Settings of the policy `attention`.")
    linear: LinearSettings = setting(LinearSettings(), "an object", "Settings of the policy `linear`.")
    late: LateSettings = setting(LateSettings(), "an object", "Settings of the policy `late`.")
    band: BandSettings = setting(BandSettings(), "an object", "Settings of the policy `band`.")
    random: RandomSettings = setting(RandomSettings(), "an object", "Settings of the policy `random`.")
    freezeout: FreezeOutSettings = setting(FreezeOutSettings(), "an object", "Settings of the policy `freezeout`.")
    autofreeze: AutoFreezeSettings = setting(AutoFreezeSettings(), "an object", "Settings of the policy `autofreeze`.")
    egeria: EgeriaSettings = setting(EgeriaSettings(), "an object", "Settings of the policy `egeria`.")
    pipetransformer: PipeTransformerSettings = setting(PipeTransformerSettings(), "an object", "Settings of the policy `pipetransformer`.")
    weight_drift: WeightDriftSettings = setting(WeightDriftSettings(), "an object", "Settings of the policy `weight_drift`.")
    schedule: ScheduleSettings = setting(ScheduleSettings(), "an object", "Settings of the policy `schedule`.")
    manual: ManualSettings = setting(ManualSettings(), "an object", "Settings of the policy `manual`: none.")
    zero3: Zero3Settings = setting(Zero3Settings(), "an object", "How ZeRO stage 3 stores frozen layers.")
    pipeline: PipelineSettings = setting(
        PipelineSettings(), "an object", "Whether layers of a pipeline move to other stages after a freeze."
    )
    fsdp: FsdpSettings = setting(FsdpSettings(), "an object", "How FSDP2 stores frozen layers.")
    cache: CacheSettings = setting(CacheSettings(), "an object", "Whether a batch that comes again skips the forward of frozen layers.")
    guard: GuardSettings | None = setting(None, "an object, or null", "Undoes a freeze that made a metric worse; null: no guard.")
    _object: PolicyObject | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _stage_holds_a_snapshot(self) -> FreezeConfig:
        """Refuse two user values that contradict each other.

        A default is adjusted to the other value later, and so is a share that is set next to a number.
        """
        freeze, snapshot = self.freeze_interval, self.snapshot_interval
        if is_default(self, "freeze_interval") or is_default(self, "snapshot_interval"):
            return self
        if isinstance(freeze, int) and isinstance(snapshot, int) and freeze < snapshot:
            raise ValueError(f"freeze_interval: got {freeze}; allowed: an integer >= snapshot_interval ({snapshot})")
        often, seldom = percent_of(snapshot), percent_of(freeze)
        if often is not None and seldom is not None and seldom < often:
            raise ValueError(f"freeze_interval: got '{freeze}'; allowed: a share >= snapshot_interval ({snapshot})")
        return self

    @model_validator(mode="after")
    def _settings_have_a_policy(self) -> FreezeConfig:
        """Refuse `policy_settings` where a built-in policy, which does not read it, decides."""
        if self.policy_settings and not self.is_own_policy:
            raise ValueError(
                f"policy_settings: got {show(self.policy_settings)}; allowed with the built-in policy {self.policy!r}: an empty object, "
                f"as its settings are in {SECTION}.{self.policy}"
            )
        return self

    @property
    def is_own_policy(self) -> bool:
        """Whether the policy is not one of this package's."""
        return self.policy not in get_args(PolicyName)

    @property
    def policy_object(self) -> PolicyObject | None:
        """The policy as the script passed it; None if the settings name it."""
        return self._object if self._object is not None and self._object.name == self.policy else None

    @property
    def chosen_settings(self) -> dict[str, Any]:
        """The chosen policy's settings as written; shares are converted to steps by `intervals.resolve`."""
        if self.is_own_policy:
            return dict(self.policy_settings)
        section: Section = getattr(self, self.policy)
        return section.model_dump()

    @classmethod
    def load(cls, source: FreezeConfig | Mapping[str, Any] | str | Path | None = None) -> FreezeConfig:
        """Load and check the settings from anything that DeepSpeed accepts as its config.

        Args:
            source: One of:
                None: all defaults.
                str or Path: a DeepSpeed JSON file or, as DeepSpeed allows, its text in base64. Always a whole
                    DeepSpeed config.
                Mapping: with the key "smartfrz", a whole DeepSpeed config; otherwise, with one of `DEEPSPEED_KEYS`, a
                    whole DeepSpeed config without our section; otherwise the section itself.
                FreezeConfig: returned unchanged.
                A whole DeepSpeed config without a "smartfrz" section means all defaults.

        Returns:
            The checked settings.

        Raises:
            ValueError: Lists every problem with its key, value and allowed values; for a file, its path and what is
                wrong with it.
        """
        if isinstance(source, FreezeConfig):
            return source
        section = _with_current_names(_find_section(source))
        section = with_object(section) if isinstance(section, Mapping) else section
        given = section["policy"] if isinstance(section, dict) and isinstance(section.get("policy"), PolicyObject) else None
        section = {**section, "policy": given.name} if isinstance(section, dict) and given is not None else section
        try:
            config = cls.model_validate(section)
        except ValidationError as error:
            raise ValueError("\n".join(problems(error, section, cls, SECTION))) from None
        if given is not None and config.policy_settings:
            raise ValueError(f"{SECTION}.policy_settings: got {show(config.policy_settings)}; allowed with an object: an empty object")
        config._object = given
        return config


def _with_current_names(section: object) -> object:
    """Replace the key `allow_untested_versions` of version 0.1 by `untested_versions`. A wrong value of it is left as it is."""
    if not isinstance(section, Mapping) or not isinstance(section.get(_FORMER), bool) or "untested_versions" in section:
        return section
    rest = {key: value for key, value in section.items() if key != _FORMER}
    current = "allow" if section[_FORMER] else "check"
    warnings.warn(f"{SECTION}.{_FORMER} is deprecated: set {SECTION}.untested_versions to {current!r}", FutureWarning, stacklevel=4)
    return {**rest, "untested_versions": current}


_FORMER = "allow_untested_versions"


def with_settings(source: FreezeConfig | Mapping[str, Any] | str | Path | None, settings: Mapping[str, Any]) -> FreezeConfig:
    """Load settings and override some of them.

    Args:
        source: As in `FreezeConfig.load`.
        settings: Top-level keys of the section and their new values; `policy` may be an object.

    Raises:
        ValueError: As in `FreezeConfig.load`.
    """
    if not settings:
        return FreezeConfig.load(source)
    settings = with_object(settings)
    section = source.model_dump(exclude_unset=True) if isinstance(source, FreezeConfig) else _find_section(source)
    if isinstance(source, FreezeConfig) and source.policy_object is not None:
        section = {**source.model_dump(exclude_unset=True), "policy": source.policy_object}
    return FreezeConfig.load({SECTION: {**section, **settings} if isinstance(section, Mapping) else section})


def is_default(config: FreezeConfig, key: str) -> bool:
    """Return whether a setting equals its default value, whether the user wrote it or not."""
    return bool(getattr(config, key) == FreezeConfig.model_fields[key].default)


def digest(config: FreezeConfig) -> str:
    """Hash the settings that all ranks must share: everything except `log_path`. Shares are hashed as written.

    Returns:
        A sha256 digest (64 hex digits).
    """
    data = config.model_dump(mode="json", exclude={"log_path"})
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _find_section(source: object) -> object:
    """Return the unchecked value of "smartfrz"; {} if there is none. Follows the rules of `FreezeConfig.load`."""
    if source is None:
        return {}
    if isinstance(source, str | Path):
        whole, where = read_config(source)
        is_section = False
    elif isinstance(source, Mapping):
        whole, where = source, "config"
        is_section = not DEEPSPEED_KEYS.intersection(source)
    else:
        raise ValueError(f"config: got {type(source).__name__}; allowed: a path, a dict, a FreezeConfig or None")
    if SECTION in whole:
        return whole[SECTION]
    # A misspelt section name must not silently fall back to all defaults.
    near = get_close_matches(SECTION, [key for key in whole if isinstance(key, str)], n=1, cutoff=0.75)
    if near:
        raise ValueError(f"{where}: {near[0]}: unknown key; did you mean {SECTION!r}?")
    if is_section:
        return dict(whole)
    # "enabled" and "seed" are too common to be attributed to us.
    stray = [key for key in FreezeConfig.model_fields if key in whole and key not in ("enabled", "seed")]
    if stray:
        raise ValueError(f"{where}: {', '.join(stray)}: a setting of smartfrz outside its section; allowed: inside {SECTION!r}: {{…}}")
    return {}
