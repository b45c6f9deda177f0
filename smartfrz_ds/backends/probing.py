"""Queries of an engine's attributes for features that are on. Nothing has a default, so that a renamed attribute is noticed."""

from __future__ import annotations

import inspect
from typing import Any


class CannotTell(Exception):
    """An attribute that shows whether a feature is on is missing, or has an unexpected type. The message continues "DeepSpeed N"."""


def ask(root: Any, path: str) -> Any:
    """Return the value at a path such as "checkpoint_engine.is_decoupled()".

    Args:
        root: An object or a module.
        path: Attributes, separated by dots; one with "()" is called without arguments.

    Raises:
        CannotTell: An attribute of the path is missing. DeepSpeedEngine passes unknown names on to the user's model (__getattr__):
            attributes of the model do not count.
    """
    found = root
    for part in path.split("."):
        name = part.removesuffix("()")
        if name not in getattr(found, "__dict__", {}) and not hasattr(type(found), name):
            owner = getattr(found, "__name__", None) or type(found).__name__
            raise CannotTell(f"has no attribute {owner}.{name}")
        found = getattr(found, name)
        if part.endswith("()"):
            found = found()
    return found


def ask_switch(root: Any, path: str) -> bool:
    """Return a switch as `ask` does; None is off.

    Raises:
        CannotTell: As `ask`, or if the value is not a switch, such as a method that was an attribute.
    """
    value = ask(root, path)
    if value is not None and not isinstance(value, bool | int):
        raise CannotTell(f"has at {path} a {type(value).__name__}, not true or false")
    return bool(value)


def ask_count(root: Any, path: str) -> int:
    """Return a number as `ask` does; an enumeration of numbers counts as one.

    Raises:
        CannotTell: As `ask`, or if the value is not a number.
    """
    value = ask(root, path)
    if not isinstance(value, int):
        raise CannotTell(f"has at {path} a {type(value).__name__}, not a number")
    return int(value)


def ask_late(function: Any, name: str) -> None:
    """Check that a function still uses this attribute, which its objects get only later, so that `ask` can't find it yet.

    Raises:
        CannotTell: The function does not use it.
    """
    whole = inspect.unwrap(function)
    if name not in whole.__code__.co_names:
        raise CannotTell(f"does not use the attribute {name} in {whole.__qualname__}")
