"""Asking an engine's inside whether a feature is on, so that an attribute that a release renamed is noticed: nothing has a default."""

from __future__ import annotations

import inspect
from typing import Any


class CannotTell(Exception):
    """An attribute that says whether a feature is on is missing, or is of another kind. The message goes on from "DeepSpeed N"."""


def ask(root: Any, path: str) -> Any:
    """The value at a path such as "checkpoint_engine.is_decoupled()".

    Args:
        root: an object or a module.
        path: attributes by dots; one with "()" is called without arguments.

    Raises:
        CannotTell: an attribute of the path is missing. DeepSpeedEngine hands unknown names on to the user's model (__getattr__): one of
            the model's does not count.
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
    """As `ask`, of something that is on or off; None is off.

    Raises:
        CannotTell: also where the value is neither, as a method would be that was an attribute.
    """
    value = ask(root, path)
    if value is not None and not isinstance(value, bool | int):
        raise CannotTell(f"has at {path} a {type(value).__name__}, not true or false")
    return bool(value)


def ask_count(root: Any, path: str) -> int:
    """As `ask`, of a number; an enumeration of numbers is one.

    Raises:
        CannotTell: also where the value is not a number.
    """
    value = ask(root, path)
    if not isinstance(value, int):
        raise CannotTell(f"has at {path} a {type(value).__name__}, not a number")
    return int(value)


def ask_late(function: Any, name: str) -> None:
    """Check that a function still uses this attribute, which its objects get only later, so that `ask` can't find it yet.

    Raises:
        CannotTell: it doesn't.
    """
    whole = inspect.unwrap(function)
    if name not in whole.__code__.co_names:
        raise CannotTell(f"does not use the attribute {name} in {whole.__qualname__}")
