"""Layers that the user lists by name patterns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from .facts import class_of, has_state, join, looks_like_embedding, weight_of
from .structure import Group


def pattern_groups(model: nn.Module, patterns: Sequence[str]) -> list[Group]:
    """Build the groups that the user lists.

    Args:
        model: The model.
        patterns: Name patterns as in `find_layers`.

    Returns:
        One group for each match, in the order of the patterns.

    Raises:
        ValueError: There is no pattern, one matches nothing, or two match the same weights; names the pattern.
    """
    if not patterns:
        raise ValueError("smartfrz.layers: got []; allowed: 'auto' or a list with at least one name")
    named = {path: module for path, module in _walk("", model, set()) if path}
    groups: list[Group] = []
    taken: dict[str, str] = {}
    for pattern in patterns:
        hits = [path for path, module in named.items() if _matches(path, pattern) and (module is None or weight_of(module) > 0)]
        if not hits:
            raise ValueError(
                f"smartfrz.layers: {pattern!r} matches no module or parameter with weights, part by part, from the root; "
                f"{nearest(pattern, list(named))}"
            )
        for path in hits:
            clash = next((other for other in taken if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")), None)
            if clash is not None:
                raise ValueError(f"smartfrz.layers: {pattern!r} matches {path!r}, but {taken[clash]!r} has already taken {clash!r}")
            groups.append(Group(path, "block", [path]))
        taken.update(dict.fromkeys(hits, pattern))
    leading = True
    for group in groups:
        module = named[group.name]
        leading = leading and (module is None or looks_like_embedding(group.name, module))
        if leading or (module is not None and issubclass(class_of(module), nn.Embedding)):
            group.kind = "embedding"
    # Everything unlisted: the largest modules that contain no listed name, and single parameters.
    rest: list[str] = []
    covered = {m for path in taken if (module := named[path]) is not None for m in module.modules()}

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
    if rest:
        groups.append(Group("head" if "head" not in taken else "rest", "head", rest))
    else:
        groups[-1].kind = "head"
    return groups


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
