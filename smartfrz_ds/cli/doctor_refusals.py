"""`smartfrz doctor`, third part: values that DeepSpeed itself refuses, and features that a JSON and a model together turn on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from smartfrz_ds.config.reading import read_config
from smartfrz_ds.config.refusals import ENDING, REFUSALS

from .findings import Finding


def wrong_values(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Find values of a DeepSpeed config that DeepSpeed itself refuses.

    Args:
        raw: The whole DeepSpeed config.

    Returns:
        Pairs of text and remedy. Empty where DeepSpeed is not installed.
    """
    try:
        # The functions that deepspeed/runtime/config.py calls for each section; its whole parser needs a process group.
        from deepspeed.runtime import config as parser
        from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
        from deepspeed.runtime.zero.config import get_zero_config
    except ModuleNotFoundError:  # reported by the check of versions
        return []
    except ImportError as error:
        return [(f"the values of the DeepSpeed config cannot be checked: {error}", "install a tested version of DeepSpeed")]
    reject = getattr(parser, "_reject_removed_config_keys", None)  # since 0.19.7
    if reject is not None and (removed := _refused_values("", reject, raw)):
        return removed  # their sections would report them again as unknown keys
    checks = {"zero_optimization": get_zero_config, "bf16": get_bfloat16_config, "fp16": get_float16_config}
    return [found for key, check in checks.items() if raw.get(key) is not None for found in _refused_values(key, check, raw)]


def _refused_values(key: str, check: Callable[[dict[str, Any]], Any], raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    answer = "correct it: DeepSpeed stops with this error at the start (deepspeed.ai/docs/config-json)"
    try:
        check(dict(raw))
    except ValidationError as error:
        return [(_in_words(key, dict(e)), answer) for e in error.errors()]
    except Exception as error:
        return [(f"{key + ': ' if key else ''}{' '.join(str(error).split())}", answer)]
    return []


def _in_words(section_name: str, error: Mapping[str, Any]) -> str:
    where = ".".join([section_name, *map(str, error["loc"])])
    if where == "zero_optimization.stage":  # pydantic lists DeepSpeed's enumeration, in which 3 has two names
        return f"{where}: got {error['input']!r}; allowed: 0, 1, 2, 3"
    why = str(error["msg"]).removeprefix("Assertion failed, ").removeprefix("Value error, ")
    got = f"got {error['input']!r}; " if isinstance(error["input"], str | int | float | list) else ""
    return f"{where}: {got}{why[:1].lower()}{why[1:]}"


def check_together(model: nn.Module, config: Path | Mapping[str, Any] | None) -> list[Finding]:
    """Find what the start of a run refuses because of the model, with the same message.

    Args:
        model: The model as the run builds it. It is not changed.
        config: A DeepSpeed JSON or its content; None where unknown.
    """
    try:
        from deepspeed.moe.layer import MoE
    except ImportError:
        return []
    raw: Mapping[str, Any] = {} if config is None else config if isinstance(config, Mapping) else read_config(config)[0]
    found = []
    if any(isinstance(m, MoE) for m in model.modules()) and not REFUSALS["moe"].keys(raw):
        found.append((REFUSALS["moe"].describe(raw), REFUSALS["moe"].remedy))
    return [Finding("model", "problem", f"{said}: {ENDING}", remedy) for said, remedy in found]
