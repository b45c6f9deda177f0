"""The settings in docs/configuration.md, generated from the declarations: their defaults in the page, their table in the site."""

from __future__ import annotations

import json

from .problems import allowed_for, items_of, section_of
from .sections import Section
from .settings import FreezeConfig

DEFAULTS_BEGIN = "<!-- defaults: begin (made from smartfrz_ds/config/settings.py) -->"
DEFAULTS_END = "<!-- defaults: end -->"


def to_markdown() -> str:
    """Return the Markdown table of all keys, one row each; keys of sub-sections are dotted."""
    rows = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for name, field in FreezeConfig.model_fields.items():
        if section_of(field) is not None and field.default is not None:
            continue
        rows.append(_row(name, FreezeConfig))
    for name, field in FreezeConfig.model_fields.items():
        if (section := section_of(field)) is not None:
            for key, inner in section.model_fields.items():
                rows.append(_row(key, section, prefix=f"{name}."))
                if (items := items_of(inner)) is not None:
                    rows += [_row(part, items, prefix=f"{name}.{key}[…].") for part in items.model_fields]
    return "\n".join(rows) + "\n"


def defaults() -> str:
    """Return a JSON block with every key and its default; sub-sections on a line each."""
    lines = []
    for name, field in FreezeConfig.model_fields.items():
        section = section_of(field)
        value = (
            field.get_default()
            if section is None or field.default is None
            else {k: f.get_default() for k, f in section.model_fields.items()}
        )
        lines.append(f"    {json.dumps(name)}: {json.dumps(value)}")
    return '```json\n{\n  "smartfrz": {\n' + ",\n".join(lines) + "\n  }\n}\n```\n"


def update_docs(text: str) -> str:
    """Replace the defaults between the two markers of a page.

    Args:
        text: The page's text.

    Returns:
        The text with the regenerated defaults.

    Raises:
        ValueError: A marker is missing.
    """
    head, begin, rest = text.partition(DEFAULTS_BEGIN)
    _, end, tail = rest.partition(DEFAULTS_END)
    if not begin or not end:
        raise ValueError(f"the document needs the two lines {DEFAULTS_BEGIN!r} and {DEFAULTS_END!r}, in this order")
    return f"{head}{begin}\n{defaults()}{end}{tail}"


def _row(key: str, section: type[Section], prefix: str = "") -> str:
    default = json.dumps(section.model_fields[key].get_default())
    cells = (f"`{prefix}{key}`", f"`{default}`", allowed_for(key, section), section.model_fields[key].description or "")
    return "| " + " | ".join(cells) + " |"
