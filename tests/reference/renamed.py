"""Renames an attribute or a method throughout an installed package, in this process: a release in which it has another name.

The package goes on working, as every use in its own code has the new name; only those who used the old one from outside notice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FunctionType
from typing import Any


@contextmanager
def renamed(package: str, old: str, new: str = "") -> Iterator[None]:
    """Within the block `package` calls `old` by another name."""
    new = new or f"{old}_of_a_new_release"
    assert rename(package, old, new), f"{package} has no {old}"
    try:
        yield
    finally:
        rename(package, new, old)


def rename(package: str, old: str, new: str) -> int:
    """Rename in all modules of the package that are loaded. Returns the number of places."""
    changed, seen = 0, set()
    inside = (package, f"{package}.")
    for name, module in list(sys.modules.items()):
        if module is None or not (name == inside[0] or name.startswith(inside[1])):
            continue
        for thing in list(vars(module).values()):
            changed += _in_thing(thing, package, old, new, seen)
        if isinstance(vars(module).get(old), FunctionType):
            vars(module)[new] = vars(module).pop(old)
            changed += 1
    return changed


def _in_thing(thing: Any, package: str, old: str, new: str, seen: set[int]) -> int:
    if id(thing) in seen or (getattr(thing, "__module__", None) or "").split(".")[0] != package.split(".")[0]:
        return 0
    if isinstance(thing, FunctionType):
        seen.add(id(thing))
        return _in_function(thing, package, old, new, seen)
    if not isinstance(thing, type):
        inner = getattr(thing, "__wrapped__", None)  # functools.lru_cache
        return _in_thing(inner, package, old, new, seen) if inner is not None else 0
    seen.add(id(thing))
    changed = 0
    for value in list(vars(thing).values()):
        parts = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
        changed += sum(_in_thing(part, package, old, new, seen) for part in parts)
    if old in vars(thing):
        value = vars(thing)[old]
        delattr(thing, old)
        setattr(thing, new, value)
        changed += 1
    notes = vars(thing).get("__annotations__", {})
    if old in notes:
        notes[new] = notes.pop(old)
        changed += 1
    return changed


def _in_function(function: FunctionType, package: str, old: str, new: str, seen: set[int]) -> int:
    code, changed = _in_code(function.__code__, old, new)
    if changed:
        function.__code__ = code
    for cell in function.__closure__ or ():  # what a decorator holds
        with suppress(ValueError):  # an empty one
            changed += _in_thing(cell.cell_contents, package, old, new, seen)
    return changed


def _in_code(code: CodeType, old: str, new: str) -> tuple[CodeType, int]:
    changed, consts = int(old in code.co_names), []
    for const in code.co_consts:
        if isinstance(const, CodeType):
            const, inner = _in_code(const, old, new)
            changed += inner
        elif isinstance(const, str) and const == old:
            const, changed = new, changed + 1
        consts.append(const)
    if not changed:
        return code, 0
    names = tuple(new if name == old else name for name in code.co_names)
    return code.replace(co_names=names, co_consts=tuple(consts)), changed
