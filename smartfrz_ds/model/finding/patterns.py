"""Layers that the user lists by name patterns, and parts that are taken out of other layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from .facts import class_of, has_state, join, looks_like_embedding, weight_of
from .structure import Group, block_groups, child_groups

AUTO = "auto"

Named = Mapping[str, nn.Module | None]  # None: a parameter


def pattern_groups(model: nn.Module, patterns: Sequence[str]) -> list[Group]:
    """Build the groups that the user lists.

    Args:
        model: The model.
        patterns: Name patterns as in `find_layers`.

    Returns:
        One group for each match, in the order of the patterns; a match inside another one next to it.

    Raises:
        ValueError: There is no pattern, one matches nothing, two match the same name, or a layer has no weights besides
            those that are taken out of it; names the pattern.
    """
    if not patterns:
        raise ValueError("smartfrz.layers: got []; allowed: 'auto' or a list with at least one name")
    if list(patterns).count(AUTO) > 1:
        raise ValueError(f"smartfrz.layers: got 'auto' {list(patterns).count(AUTO)} times; allowed: once")
    named = {path: module for path, module in _walk("", model, set()) if path}
    entries = [entry for number, pattern in enumerate(patterns) for entry in _entries(model, named, number, pattern)]
    taken: dict[str, str] = {}
    for entry in entries:
        for path in entry.group.paths if entry.pattern != AUTO else ():
            if path in taken:
                raise ValueError(f"smartfrz.layers: {entry.pattern!r} matches {path!r}, but {taken[path]!r} has already taken {path!r}")
            taken[path] = entry.pattern
    groups = [group for entry in _nested(entries) for group in _unfold(model, entry)]
    if AUTO not in patterns:
        _set_kinds(named, groups)
        rest = _rest_of(model, taken)
        if rest:
            groups.append(Group("head" if "head" not in taken else "rest", "head", rest))
    names = [group.name for group in groups]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"smartfrz.layers: two layers would have the name {twice!r}: it is a match of a pattern, and the rest has it too")
    if groups[-1].kind != "head":
        groups[-1].kind = "head"
    return groups


@dataclass
class _Entry:
    """A group of the list, and the parts that other entries take out of it.

    Attributes:
        number: Position of its pattern in the list.
        pattern: The pattern.
        group: The group as it is without other entries.
        parts: Entries whose names are inside the group.
    """

    number: int
    pattern: str
    group: Group
    parts: list[_Entry] = field(default_factory=list)


def _entries(model: nn.Module, named: Named, number: int, pattern: str) -> list[_Entry]:
    if pattern == AUTO:
        return [_Entry(number, pattern, group) for group in block_groups(model) or child_groups(model)]
    hits = [path for path, module in named.items() if _matches(path, pattern) and (module is None or weight_of(module) > 0)]
    if not hits:
        raise ValueError(
            f"smartfrz.layers: {pattern!r} matches no module or parameter with weights, part by part, from the root; "
            f"{nearest(pattern, list(named))}"
        )
    return [_Entry(number, pattern, Group(path, "block", [path])) for path in hits]


def _nested(entries: Sequence[_Entry]) -> list[_Entry]:
    """Return the entries that are not inside others, with those that are as their parts."""
    of_auto = {path: entry for entry in entries if entry.pattern == AUTO for path in entry.group.paths}
    listed = {entry.group.name: entry for entry in entries if entry.pattern != AUTO}
    outer: list[_Entry] = []
    for entry in entries:
        around = None
        if entry.pattern != AUTO:
            name = entry.group.name
            above = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]  # from the inside
            places = [*(listed.get(path) for path in above), *(of_auto.get(path) for path in (name, *above))]
            around = next((found for found in places if found is not None), None)
        (outer if around is None else around.parts).append(entry)
    return outer


def _unfold(model: nn.Module, entry: _Entry) -> Iterator[Group]:
    """Yield the parts of an entry and the rest of it: those whose patterns are listed before its own, the rest, the others."""
    group = entry.group
    for part in entry.parts:
        module = _at(model, part.group.name)
        if group.kind == "embedding" or (isinstance(module, nn.Module) and issubclass(class_of(module), nn.Embedding)):
            part.group.kind = "embedding"
    before = [part for part in entry.parts if part.number < entry.number or group.kind == "head"]  # nothing is behind the head
    for part in before:
        yield from _unfold(model, part)
    if taken := {path for part in entry.parts for path in part.group.paths}:
        group.rest_of = group.name if group.name in group.paths else ""
        group.paths = [rest for path in group.paths for rest in _without(path, _at(model, path), taken)]
        if not any(not isinstance(found := _at(model, path), nn.Module) or weight_of(found) for path in group.paths):
            patterns = ", ".join(repr(pattern) for pattern in dict.fromkeys(part.pattern for part in entry.parts))
            raise ValueError(
                f"smartfrz.layers: {entry.pattern!r} makes {group.name!r} a layer, but all its weights are taken by {patterns}; "
                "allowed: a part of them"
            )
    yield group
    for part in entry.parts:
        if part not in before:
            yield from _unfold(model, part)


def _without(path: str, module: object, taken: set[str]) -> list[str]:
    """Return the largest modules, and the parameters, that make up `path` without the names `taken`."""
    if path in taken:
        return []
    if not isinstance(module, nn.Module) or not any(other.startswith(f"{path}.") for other in taken):
        return [path]
    found = [below for name, _ in module.named_parameters(recurse=False) if (below := join(path, name)) not in taken]
    return found + [rest for name, child in module.named_children() for rest in _without(join(path, name), child, taken)]


def _set_kinds(named: Named, groups: Sequence[Group]) -> None:
    leading = True
    for group in groups:
        module = named[group.name]
        leading = leading and (module is None or looks_like_embedding(group.name, module))
        if leading or (module is not None and issubclass(class_of(module), nn.Embedding)):
            group.kind = "embedding"


def _rest_of(model: nn.Module, taken: Mapping[str, str]) -> list[str]:
    """Return everything unlisted: the largest modules that contain no listed name, and single parameters."""
    rest: list[str] = []
    covered = {m for path in taken if isinstance(module := _at(model, path), nn.Module) for m in module.modules()}

    def gather(path: str, module: nn.Module) -> None:
        rest.extend(p for name, _ in module.named_parameters(recurse=False) if (p := join(path, name)) not in taken)
        for name, child in module.named_children():
            below = join(path, name)
            if child in covered:
                continue
            covered.add(child)
            if any(other.startswith(f"{below}.") for other in taken):
                gather(below, child)
            elif has_state(child):
                rest.append(below)

    gather("", model)
    return rest


def _at(model: nn.Module, path: str) -> object:
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def _walk(path: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module | None]]:
    """Yield every module and (as None) parameter with its name, in the order of registration; a shared module once."""
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, _ in module.named_parameters(recurse=False):
            yield join(path, name), None
        for name, child in module.named_children():
            yield from _walk(join(path, name), child, seen)


def _matches(path: str, pattern: str) -> bool:
    parts, globs = path.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(fnmatchcase(part, glob) for part, glob in zip(parts, globs, strict=True))


def nearest(pattern: str, names: Sequence[str]) -> str:
    """Name the closest matches of a pattern, for a message.

    Args:
        pattern: A pattern that matches no name.
        names: All names of modules and parameters.
    """
    near = get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
    return f"the nearest names are {', '.join(map(repr, near))}"
