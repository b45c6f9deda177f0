"""Read a DeepSpeed config from a file or a base64 text."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hjson  # type: ignore[import-untyped]

_OTHERS = {".yaml": "YAML", ".yml": "YAML", ".py": "Python", ".toml": "TOML", ".ini": "INI"}


def read_config(source: str | Path) -> tuple[Mapping[str, Any], str]:
    """Read a DeepSpeed config like deepspeed/runtime/config.py: Hjson (JSON with comments) or base64.

    Args:
        source: Path of the file, or the config's text in base64.

    Returns:
        The config and a name for it in messages.

    Raises:
        ValueError: Names the file and what is wrong with it.
    """
    where = str(source)
    try:
        if not os.path.exists(source):  # Path.exists raises if the name is as long as a base64 text
            decoded = _base64_text(where)
            if decoded is None:
                raise ValueError("no such file")
            text, where = decoded, "config (base64)"
        else:
            language = _OTHERS.get(Path(source).suffix.lower())
            if language is not None:  # Hjson would take some YAML for one long text
                raise ValueError(f"it is named as a {language} file; allowed: JSON, as DeepSpeed reads it")
            text = Path(source).read_text(encoding="utf-8-sig")
        data = hjson.loads(text, object_pairs_hook=_no_duplicates)
        if not isinstance(data, dict):
            raise ValueError(f"got {show(data)}; allowed: a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where[:200]}: not a readable DeepSpeed JSON: {error}") from error
    return data, where


def total_steps_in(config: Mapping[str, Any], total_steps: int | str | None) -> int | None:
    """Return the number of steps of the whole run given in a DeepSpeed config; None if it is not given.

    Args:
        config: The whole DeepSpeed config.
        total_steps: The value of `smartfrz.total_steps`; a number takes precedence, None means unknown.
    """
    if total_steps != "auto":
        return total_steps if isinstance(total_steps, int) else None
    scheduler = config.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    value = params.get("total_num_steps") if isinstance(params, Mapping) else None
    return value if isinstance(value, int) and value > 0 else None


def _base64_text(source: str) -> str | None:
    try:
        text = base64.b64decode(source, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None  # otherwise it is the name of a missing file


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate keys: {', '.join(sorted({key for key in keys if keys.count(key) > 1}))}")
    return data


def show(value: object) -> str:
    """Format a value as the user wrote it in JSON ("50" differs from 50, true from 1), shortened to 80 characters."""
    text = json.dumps(value, default=repr, skipkeys=True, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
