"""Queries of an engine's attributes: for features that are on, and for everything that a backend needs.

Nothing has a default, so that a renamed attribute is noticed.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from types import CodeType, ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet


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


# --- what a backend needs of an engine -------------------------------------------------------------------------------------------------

#: The most lines of a refusal.
SHOWN = 12
#: Returns the object that an owner's name stands for, such as "optimizer"; raises CannotTell or ImportError if there is none.
Roots = Callable[[str], Any]


@dataclass(frozen=True)
class Need:
    """One thing of DeepSpeed or torch that a backend touches. Made by `has`, `takes`, `late` and `overrides`.

    Attributes:
        owner: Name of the object or class that has it, for `Roots`.
        names: The attribute; of several, one is enough (releases name it differently).
        file: The file that defines it.
        kind: Name of the builtin type that it must be an instance of; "" if any will do.
        call: How it is called: the number of positional arguments and the names of the others; None if it is not called.
        parameters: Of a method that this package overrides: the parameters that DeepSpeed gives it, in order; None if it is not overridden.
        used_by: A function of the owner that must use the attribute; "" if none is known.
        exists_late: Whether the attribute is set after the start, so that only `used_by` shows it.
        versions: The releases that have it, as a specifier (">=0.19.7"); others are handled without it. "": all.
    """

    owner: str
    names: tuple[str, ...]
    file: str
    kind: str = ""
    call: tuple[int, tuple[str, ...]] | None = None
    parameters: tuple[str, ...] | None = None
    used_by: str = ""
    exists_late: bool = False
    versions: str = ""


def has(owner: str, file: str, names: str, *, versions: str = "") -> list[Need]:
    """Return the needs of attributes.

    Args:
        owner: As in `Need`.
        file: As in `Need`.
        names: The attributes, separated by spaces. "a|b": one of the two is enough. "a:dict": one of this builtin type.
        versions: As in `Need`.
    """
    parts = [name.partition(":") for name in names.split()]
    return [Need(owner, tuple(name.split("|")), file, kind=kind, versions=versions) for name, _, kind in parts]


def takes(owner: str, file: str, *calls: str, versions: str = "") -> list[Need]:
    """Return the needs of functions.

    Args:
        owner: As in `Need`.
        file: As in `Need`.
        calls: How each is called: "name()", "name(2)" with two positional arguments, "name(1, key)" with one and the keyword `key`.
        versions: As in `Need`.
    """
    needs = []
    for call in calls:
        name, _, inside = call.removesuffix(")").partition("(")
        arguments = [part.strip() for part in inside.split(",") if part.strip()]
        count = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 0
        needs.append(Need(owner, tuple(name.split("|")), file, call=(count, tuple(arguments)), versions=versions))
    return needs


def late(owner: str, file: str, name: str, *, used_by: str, versions: str = "") -> list[Need]:
    """Return the need of an attribute that is set after the start.

    Args:
        owner: As in `Need`: of the function.
        file: As in `Need`.
        name: The attribute.
        used_by: The function that sets or reads it.
        versions: As in `Need`.
    """
    return [Need(owner, (name,), file, used_by=used_by, exists_late=True, versions=versions)]


def overrides(owner: str, file: str, method: str, *, used_by: str = "", versions: str = "") -> list[Need]:
    """Return the need of a method that this package overrides.

    Args:
        owner: As in `Need`.
        file: As in `Need`.
        method: "name(first, second)" with the parameters of the override; "name(first, ...)" where it passes on any others.
        used_by: A method of DeepSpeed's that calls it: an override that nothing calls would silently have no effect.
        versions: As in `Need`.
    """
    name, _, inside = method.removesuffix(")").partition("(")
    parameters = tuple(part.strip() for part in inside.split(",") if part.strip())
    return [Need(owner, (name,), file, parameters=parameters, used_by=used_by, versions=versions)]


def missing(needs: Iterable[Need], root_of: Roots, version: str) -> list[str]:
    """Return what an engine lacks of these needs, in words: "DeepSpeedZeroOptimizer.bit16_groups (runtime/zero/stage_1_and_2.py)".

    Args:
        needs: The needs.
        root_of: Returns an owner's object.
        version: The installed version, for `Need.versions`.
    """
    found = []
    for need in needs:
        if need.versions and not SpecifierSet(need.versions).contains(version.split("+")[0], prereleases=True):
            continue
        try:
            root = root_of(need.owner)
        except (CannotTell, ImportError, AttributeError) as error:
            found.append(f"{need.owner}, which has {' or '.join(need.names)} ({need.file}): {error}")
            continue
        if why := _lacks(root, need):
            found.append(f"{_owner_name(root)}.{why} ({need.file})")
    return list(dict.fromkeys(found))


def refusal(found: str, lines: list[str], library: str) -> str:
    """Return the text of a refusal: what this version lacks, and what to do.

    Args:
        found: Name and version of the library.
        lines: What it lacks.
        library: Its name.
    """
    shown, more = lines[:SHOWN], len(lines) - SHOWN
    listed = f" {shown[0]}" if len(lines) == 1 else "".join(f"\n- {line}" for line in shown)
    listed += f"\n- and {more} more" if more > 0 else ""
    return (
        f"{found} has no{listed}\nNothing was changed. Install a tested {library} (`smartfrz doctor` names the versions), use an option "
        "that does not need this, or set smartfrz.enabled to false to train without freezing."
    )


def _lacks(root: Any, need: Need) -> str:
    """Return what is wrong with a need, beginning with its name; "" if nothing is."""
    name = next((n for n in need.names if need.exists_late or _has(root, n)), "")
    if not name:
        return " or ".join(need.names)
    if need.used_by:
        users = _definitions(root, need.used_by)
        if not users:
            return f"{need.used_by}, which uses {name}"
        if not any(_uses(_unwrapped(user), name) for user in users):
            return f"{name}: {need.used_by} does not use it"
    if need.exists_late:
        return ""
    value = getattr(root, name)
    # a number that comes from a computation of DeepSpeed's is one of NumPy
    if need.kind and not isinstance(value, Integral if need.kind == "int" else getattr(builtins, need.kind)):
        return f"{name} as a {need.kind}: it is a {type(value).__name__}"
    if need.call is not None:
        return _cannot_call(name, value, *need.call)
    if need.parameters is None:
        return ""
    return _cannot_override(name, next(_of_libraries(root, name), value), need.parameters)


def _has(root: Any, name: str) -> bool:
    """Whether an object has an attribute of its own: DeepSpeedEngine passes unknown names on to the user's model (__getattr__)."""
    if isinstance(root, type | ModuleType):
        return hasattr(root, name)
    own = getattr(root, "__dict__", {})
    registered = (own.get(table) or {} for table in ("_modules", "_parameters", "_buffers"))  # torch/nn/modules/module.py
    return name in own or hasattr(type(root), name) or any(name in table for table in registered)


def _cannot_call(name: str, function: Any, count: int, keywords: tuple[str, ...]) -> str:
    if not callable(function):
        return f"{name}() as a function: it is a {type(function).__name__}"
    signature = _signature(function)
    if signature is None:
        return ""
    try:
        signature.bind(*[None] * count, **dict.fromkeys(keywords))
    except TypeError as error:
        wanted = [f"{count} argument{'s' * (count != 1)}"] if count or not keywords else []
        return f"{name}{signature} with {' and '.join([*wanted, *keywords])}: {error}"
    return ""


def _cannot_override(name: str, method: Any, ours: tuple[str, ...]) -> str:
    signature = _signature(method)
    if signature is None or not callable(method):
        return f"{name}() as a method: it is a {type(method).__name__}"
    theirs = [p for p in signature.parameters.values() if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    passes_on, named = "..." in ours, [p for p in ours if p != "..."]
    same = [p.name for p in theirs[: len(named)]] == named
    # an override without "..." takes the place of a method with more parameters only if those may be left out
    rest = theirs[len(named) :]
    if same and (passes_on or all(p.default is not p.empty for p in rest)):
        return ""
    return f"{name}{signature}: this package overrides it with ({', '.join(ours)})"


def _signature(function: Any) -> inspect.Signature | None:
    """Return the signature of a function or bound method; None of one in C++ that has none."""
    plain = _unwrapped(getattr(function, "__func__", function))
    try:
        signature = inspect.signature(plain)
    except (TypeError, ValueError):
        return None
    if hasattr(function, "__func__"):
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


def _unwrapped(function: Any) -> Any:
    """Return the function inside of decorators; DeepSpeed's instrument_w_nvtx keeps it in its closure only (utils/nvtx.py)."""
    function = inspect.unwrap(function)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "func" in names and callable(inner := function.__closure__[names.index("func")].cell_contents):
        return _unwrapped(inner)
    return function


def _definitions(root: Any, name: str) -> list[Any]:
    """Return the functions of a name in all classes of an object: a subclass of the user's may go on to the one that it overrides."""
    if isinstance(root, ModuleType):
        return [getattr(root, name)] if hasattr(root, name) else []
    classes = (root if isinstance(root, type) else type(root)).__mro__
    found = [vars(cls)[name] for cls in classes if name in vars(cls)]
    return [getattr(x, "fget", None) or getattr(x, "__func__", x) for x in found]


def _of_libraries(root: Any, name: str) -> Iterator[Any]:
    """Yield the methods of a name that DeepSpeed or torch defines for an object, not the overrides in classes derived from them."""
    for cls in (root if isinstance(root, type) else type(root)).__mro__:
        if cls.__module__.split(".")[0] in ("deepspeed", "torch") and name in vars(cls):
            yield vars(cls)[name]


def _uses(function: Any, name: str) -> bool:
    """Whether a function, or one that is defined in it, names an attribute."""
    codes = [getattr(function, "__code__", None)]
    while codes:
        code = codes.pop()
        if code is None:
            continue
        if name in code.co_names or name in code.co_consts:
            return True
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return False


def _owner_name(root: Any) -> str:
    return getattr(root, "__name__", None) or type(root).__name__
