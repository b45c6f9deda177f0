"""Find the layers that the user's name patterns keep active: patterns of layers, or of modules inside them."""

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
    """The layers that a list of patterns keeps active.

    Attributes:
        names: Names of the layers.
        inside: For each pattern that names no layer but modules or parameters inside layers: the layers that contain
            them, each with the first such name. Empty if all patterns name layers.
    """

    names: frozenset[str]
    inside: Mapping[str, Mapping[str, str]]

    def reason(self, layer: str) -> str:
        """Explain which name inside `layer` keeps it active; empty if its own name does."""
        return next((f"{pattern!r} names {found[layer]} in it" for pattern, found in self.inside.items() if layer in found), "")

    def describe(self, key: str) -> str:
        """Describe the patterns that name modules inside layers in one line; empty if there are none."""
        parts = []
        for pattern, found in self.inside.items():
            shown = [f"{layer} ({name})" for layer, name in list(found.items())[:_SHOWN]]
            if len(found) > _SHOWN:
                shown.append(f"{len(found) - _SHOWN} more")
            which = "a layer, which stays" if len(found) == 1 else f"{len(found)} layers, which stay"
            parts.append(f"{pattern!r} matches modules inside {which} active as a whole: {', '.join(shown)}")
        return f"{key}: {'; '.join(parts)}" if parts else ""


def names_inside(model: nn.Module, layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Return the names of the modules and parameters in each layer that this process holds.

    Args:
        model: The model.
        layers: All layers.

    Returns:
        For each layer's name, the dotted names from the root of `model`. If a layer's name is not the path of its
        module (as in a pipeline), also the names that begin with the layer's.
    """
    paths: dict[nn.Module | nn.Parameter, list[str]] = {}  # a shared module or parameter has several
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
        # a shared weight under its name in this layer, not the one in the head
        held = {p for top in layer.modules for p in top.parameters()}
        names.update(dict.fromkeys(name for p in layer.params if p not in held for name in paths.get(p, ())))
        found[layer.name] = list(names)
    return found


def keep_active(patterns: Iterable[str], layers: Sequence[Layer], inside: Mapping[str, Sequence[str]], key: str) -> KeptActive:
    """Find the layers that `patterns` keep active.

    Args:
        patterns: Globs in which `*` spans dots. A pattern that matches whole names of layers selects these layers;
            one that matches none selects the layers that contain what it matches.
        layers: All layers.
        inside: Names of the modules and parameters in each layer (`names_inside`).
        key: The setting, for messages, for example "smartfrz.keep_active".

    Raises:
        ValueError: A pattern matches neither a layer nor anything inside one.
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
                raise ValueError(f"{key}: {pattern!r} matches no layer and no module inside one; {near}")
            contained[pattern] = found
            hits = list(found)
        kept.update(hits)
    return KeptActive(frozenset(kept), contained)
