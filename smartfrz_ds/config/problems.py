"""Messages about wrong settings, in the words with which the settings are declared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .reading import show
from .sections import Section


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the sub-section class that a key holds, also if the key is nullable; None for a plain value."""
    kinds = (field.annotation, *(get_args(field.annotation) if get_origin(field.annotation) is not tuple else ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def items_of(field: FieldInfo) -> type[Section] | None:
    """Return the class of the objects in the list that a key holds; None if it holds no list of objects."""
    args = get_args(field.annotation) if get_origin(field.annotation) is tuple else ()
    return next((kind for kind in args if isinstance(kind, type) and issubclass(kind, Section)), None)


def allowed_for(key: str, section: type[Section]) -> str:
    """Return the allowed values of a key in words."""
    extra = section.model_fields[key].json_schema_extra
    assert isinstance(extra, dict), key
    return str(extra["allowed"])


def problems(error: ValidationError, section: object, root: type[Section], name: str) -> list[str]:
    """Format validation errors, one line per wrong key, in the order found.

    Args:
        error: The errors.
        section: The value that was validated.
        root: Its class.
        name: Its name, which begins each line.

    Returns:
        Lines such as `smartfrz.attention.threshold: got 1.7; allowed: a number in (0, 1), or null`.
    """
    lines: dict[str, None] = {}  # a union reports each of its members once
    for item in error.errors(include_url=False):
        path, allowed, value, hint = name, _keys(root), section, ""
        model, items = root, None
        unknown = str(item["loc"][-1]) if item["type"] in ("extra_forbidden", "invalid_key") else None
        for part in item["loc"]:
            if items is not None and isinstance(part, int):
                assert isinstance(value, Sequence), path
                path, value, model, items = f"{path}[{part}]", value[part], items, None
                allowed = _keys(model)
                continue
            if part not in model.model_fields:
                break  # an unknown key
            key = str(part)
            assert isinstance(value, Mapping), path
            path, value, field = f"{path}.{key}", value[key], model.model_fields[key]
            inner, items = section_of(field), items_of(field)
            if inner is None:
                allowed, hint = allowed_for(key, model), _did_you_mean(value, _choices(field.annotation))
                if items is not None:
                    continue
                break  # the rest of the path is a union member or a list index
            model = inner
            allowed = _keys(model) + (", or null" if field.default is None else "")
        if unknown is not None:
            hint = _did_you_mean(unknown, model.model_fields) or _elsewhere(unknown, root, name)
            shown = unknown if unknown.isprintable() else show(unknown)
            known = hint.strip() or f"allowed: {', '.join(model.model_fields) or 'none'}"
            lines[f"{path}.{shown}: unknown key; {known}"] = None
        elif item["type"] == "value_error":  # a check across keys; its message names the key
            lines[f"{path}.{item['ctx']['error']}"] = None
        else:
            lines[f"{path}: got {show(value)}; {hint}allowed: {allowed}"] = None
    return list(lines)


def _keys(section: type[Section]) -> str:
    return f"an object with the keys {', '.join(section.model_fields)}" if section.model_fields else "an empty object"


def _choices(annotation: object) -> list[str]:
    """Collect the words of all Literals in an annotation."""
    return [word for arg in get_args(annotation) for word in ([arg] if isinstance(arg, str) else _choices(arg))]


def _did_you_mean(value: object, choices: Iterable[str]) -> str:
    near = get_close_matches(value.lower(), choices, n=1) if isinstance(value, str) else []
    return f"did you mean {near[0]!r}? " if near else ""


def _elsewhere(key: str, root: type[Section], top: str) -> str:
    """Suggest the right place for a key written one level too high or too low, such as 'threshold' for 'attention.threshold'."""
    if key in root.model_fields:
        return f"did you mean '{top}.{key}'? "
    for name, field in root.model_fields.items():
        section = section_of(field)
        near = [] if section is None else get_close_matches(key.lower(), section.model_fields, n=1, cutoff=0.75)
        if near:
            return f"did you mean '{top}.{name}.{near[0]}'? "
    return ""
