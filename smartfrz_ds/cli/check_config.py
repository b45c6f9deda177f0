"""The output of `smartfrz check-config`: the settings of a run and its first freezing stage."""

from __future__ import annotations

import json
from pathlib import Path

from smartfrz_ds.config.reading import read_config, total_steps_in
from smartfrz_ds.config.refusals import refused_by
from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.config.shares import percent_of
from smartfrz_ds.runtime.rules.before_start import problems_of_files, problems_of_length
from smartfrz_ds.runtime.rules.intervals import first_stage, resolve

_UNKNOWN = (
    f"length of the run: not in the file. The script's scheduler or Trainer sets it, or {SECTION}.total_steps; --total-steps N prints the "
    "settings for N steps"
)


def settings_text(file: Path, total_steps: int | None = None) -> str:
    """Format the settings in a DeepSpeed JSON, one per line, and the first freezing stage.

    Args:
        file: The DeepSpeed JSON.
        total_steps: Length of the run in steps, >= 1; None: taken from the file.

    Raises:
        ValueError: As `FreezeConfig.load`; or a run with these settings would stop at its start.
    """
    config = FreezeConfig.load(file)
    raw = read_config(file)[0]
    total = total_steps or total_steps_in(raw, config.total_steps)
    stops = [one.text for one in problems_of_files(config)]
    if config.enabled:
        stops += [f"{text}. {remedy[0].upper()}{remedy[1:]}" for text, remedy in refused_by(raw)]
    if stops:
        raise ValueError("\n".join(stops))
    shown = _settings(config, total)
    if config.enabled and config.policy != "manual":
        problems = problems_of_length(config, total)
        shown += [f"WARNING: {one.text}. {one.remedy[0].upper()}{one.remedy[1:]}" for one in problems]
        if not problems:
            shown += _stage(config, total) + ([] if total is not None else [_UNKNOWN])
    return "\n".join([*shown, f"{file}: ok" + ("" if config.enabled else ", freezing is disabled")])


def _settings(config: FreezeConfig, total: int | None) -> list[str]:
    """Format all settings outside sections, those of the chosen policy, and those of other sections that differ from their defaults."""
    now = resolve(config, total, provisional=total is None)
    settings, defaults = config.model_dump(mode="json"), FreezeConfig().model_dump(mode="json")
    lines = [(key, value, defaults[key], getattr(now, key, None)) for key, value in settings.items() if not isinstance(value, dict)]
    own = "policy_settings" if config.is_own_policy else config.policy
    lines += [(f"{own}.{key}", value, defaults[own].get(key, ...), now.policy[key]) for key, value in settings[own].items()]
    for name, section in settings.items():
        if isinstance(section, dict) and name != own:
            usual = defaults[name] or {}  # a section that is null by default has no defaults here
            lines += [(f"{name}.{key}", value, usual.get(key), None) for key, value in section.items() if value != usual.get(key, ...)]
    width = max(len(key) for key, *_ in lines)
    shown = []
    for key, value, default, steps in lines:
        text = f"{SECTION}.{key:<{width}}  {json.dumps(value, ensure_ascii=False)}"
        if total is not None and steps is not None and percent_of(value) is not None:
            text += f" = {steps} step{'s' * (steps != 1)}"
        shown.append(text + ("  (default)" if value == default else ""))
    return shown


def _stage(config: FreezeConfig, total: int | None) -> list[str]:
    first = first_stage(config, total)
    return [] if first is None else [f"first freezing stage: step {first}" + (f" of {total}" if total else "")]
