"""What `smartfrz check-config` prints: the settings of a run, and when it can freeze."""

from __future__ import annotations

import json
from pathlib import Path

from smartfrz_ds.config.reading import read_config
from smartfrz_ds.config.settings import SECTION, FreezeConfig
from smartfrz_ds.config.shares import percent_of
from smartfrz_ds.runtime.intervals import first_stage, resolve, why_never
from smartfrz_ds.signals.lr_forecast import total_steps_in

_UNKNOWN = (
    f"length of the run: not in the file. A scheduler or a Trainer of the script says it, or {SECTION}.total_steps; --total-steps N shows "
    "the settings for N steps"
)


def settings_text(file: Path, total_steps: int | None = None) -> str:
    """The settings in a DeepSpeed JSON, one a line, and the first freezing stage.

    total_steps: the length of the run, >= 1; None: what the file says.

    Raises:
        ValueError: as `FreezeConfig.load`.
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
    return "\n".join([*shown, f"{file}: ok" + ("" if config.enabled else ", freezing is switched off")])


def _stage(config: FreezeConfig, total: int | None) -> str:
    try:
        if why := why_never(config, total):
            return f"WARNING: {why}"
        first = first_stage(config, total)
    except ValueError as error:  # a share, and no length: a run whose script doesn't say it either ends here
        return f"WARNING: {error}"
    return f"first freezing stage: step {first}" + (f" of {total}" if total else "")
