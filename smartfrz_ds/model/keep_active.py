"""Which layers the user's name patterns keep active: patterns of layers, or of modules inside of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from smartfrz_ds.model.finding.patterns import nearest

from .layers import Layer

_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class KeptActive:
    """What a list of patterns keeps active.

    Args:
        names: of the layers.
        inside: for each pattern that names no layer but modules or parameters inside of layers: the layers that contain them, and of each
            the first such name. Empty where all patterns name layers.
    """

    names: frozenset[str]
    inside: Mapping[str, Mapping[str, str]]

    def reason(self, layer: str) -> str:
        """What inside of `layer` keeps it active, empty where its own name does."""
        return next((f"{pattern!r} names {found[layer]} in it" for pattern, found in self.inside.items() if layer in found), "")

    def told(self, key: str) -> str:
        """One line on the patterns that name modules inside of layers, empty without any."""
        parts = []
        for pattern, found in self.inside.items():
            shown = [f"{layer} ({name})" for layer, name in list(found.items())[:_SHOWN]]
            if len(found) > _SHOWN:
                shown.append(f"{len(found) - _SHOWN} more")
            which = "a layer, which stays" if len(found) == 1 else f"{len(found)} layers, which stay"
            parts.append(f"{pattern!r} matches what is inside of {which} active as a whole: {', '.join(shown)}")
        return f"{key}: {'; '.join(parts)}" if parts else ""


def names_inside(model: nn.Module, layers: Sequence[Layer]) -> dict[str, list[str]]:
    """The names of the modules and parameters in each layer, of those that this process holds.

    Returns:
        For each layer's name the dotted names from the root of `model`; where a layer's name isn't the path of its module (as in a
        pipeline), also the names that begin with the layer's.
    """
    paths: dict[nn.Module | nn.Parameter, list[str]] = {}  # a shared one has several
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    for name, p in model.named_parameters(remove_duplicate=False):
        paths.setdefault(p, []).append(name)
    found: dict[str, list[str]] = {}
    for layer in layers:
        names: dict[str, None] = {}
        for top in layer.modules:
            below = [name for name, _ in top.named_modules(remove_duplicate=False)]
            below += [name for name, _ in top.named_parameters(remove_duplicate=False)]
            for start in (*paths.get(top, ()), layer.name):
                names.update(dict.fromkeys(f"{start}.{name}".strip(".") for name in below))
        held = {p for top in layer.modules for p in top.parameters()}  # a shared weight by its name here, not by that in the head
        names.update(dict.fromkeys(name for p in layer.params if p not in held for name in paths.get(p, ())))
        found[layer.name] = list(names)
    return found


def keep_active(patterns: Iterable[str], layers: Sequence[Layer], inside: Mapping[str, Sequence[str]], key: str) -> KeptActive:
    """Find the layers that `patterns` keep active.

    Args:
        patterns: globs, of which `*` spans dots. A pattern that matches the whole name of layers picks these. One that matches none picks
            the layers that contain what it matches.
        layers: of the model.
        inside: names of the modules and parameters in each layer (`names_inside`).
        key: of the setting, for messages, for example "smartfrz.keep_active".

    Raises:
        ValueError: a pattern matches neither a layer nor anything inside of one.
    """
    names = [layer.name for layer in layers]
    kept: set[str] = set()
    contained: dict[str, dict[str, str]] = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            found = {
                name: hit for name in names if (hit := next((x for x in inside.get(name, ()) if fnmatchcase(x, pattern)), None)) is not None
            }
            if not found:
                near = nearest(pattern, [*names, *dict.fromkeys(x for name in names for x in inside.get(name, ()) if x not in names)])
                raise ValueError(f"{key}: {pattern!r} matches no layer and no module inside of one; {near}")
            contained[pattern] = found
            hits = list(found)
        kept.update(hits)
    return KeptActive(frozenset(kept), contained)
