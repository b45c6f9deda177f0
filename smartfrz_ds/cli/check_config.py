"""The output of `smartfrz check-config`: the settings of a run and its first freezing stage."""

from __future__ import annotations

import json
from pathlib import Path

from smartfrz_ds.config.reading import read_config, total_steps_in
from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.config.shares import percent_of
from smartfrz_ds.runtime.rules.intervals import first_stage, resolve, why_never

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
        ValueError: As `FreezeConfig.load`.
    """
    config = FreezeConfig.load(file)
    total = total_steps or total_steps_in(read_config(file)[0], config.total_steps)
    now = resolve(config, total, provisional=total is None)
    settings, defaults = config.model_dump(mode="json"), FreezeConfig().model_dump(mode="json")
    lines = [(key, value, defaults[key], getattr(now, key, None)) for key, value in settings.items() if not isinstance(value, dict)]
    own = settings[config.policy]
    lines += [(f"{config.policy}.{key}", value, defaults[config.policy][key], now.policy[key]) for key, value in own.items()]
    width = max(len(key) for key, *_ in lines)
    shown = []
    for key, value, default, steps in lines:
        text = f"{SECTION}.{key:<{width}}  {json.dumps(value, ensure_ascii=False)}"
        if total is not None and percent_of(value) is not None:
            text += f" = {steps} steps"
        shown.append(text + ("  (default)" if value == default else ""))
    if config.enabled and config.policy != "manual":
        shown += [_stage(config, total), *([] if total is not None else [_UNKNOWN])]
    return "\n".join([*shown, f"{file}: ok" + ("" if config.enabled else ", freezing is disabled")])


def _stage(config: FreezeConfig, total: int | None) -> str:
    try:
        if why := why_never(config, total):
            return f"WARNING: {why}"
        first = first_stage(config, total)
    except ValueError as error:  # a percentage and no length: a run whose script does not set it either stops with this error
        return f"WARNING: {error}"
    return f"first freezing stage: step {first}" + (f" of {total}" if total else "")
