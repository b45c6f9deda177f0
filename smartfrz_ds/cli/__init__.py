"""The `smartfrz` command."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "app":  # the `smartfrz` script of an editable installation from before the command moved to cli/main.py
        from .main import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
