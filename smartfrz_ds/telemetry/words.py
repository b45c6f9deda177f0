"""Numbers and names as text, for the report page and the log lines of a run."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float) -> str:
    """Format a number of bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.3g} {unit}".replace("-", "−")
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Format seconds, as milliseconds below one second, as minutes from two minutes and as hours from two hours."""
    units = (("h", 3600.0, 7200.0), ("min", 60.0, 120.0), ("s", 1.0, 1.0), ("ms", 1e-3, 0.0))
    unit, scale = next((unit, scale) for unit, scale, least in units if abs(seconds) >= least)
    return f"{seconds / scale:.3g} {unit}".replace("-", "−")


def matched_steps(steps: int, saved: float) -> int:
    """Return the length of the matched run: full training, its schedule shortened, that costs what the run did.

    Args:
        steps: Length of the run, >= 1.
        saved: Fraction of its cost that freezing saved, in [0, 1].
    """
    return max(1, min(steps, round(steps * (1 - saved))))


def matched(steps: int, saved: float) -> str:
    """Format a saving with the matched run beside it, which is what the saving has to be better than."""
    return f"a full run of {matched_steps(steps, saved):,} of {steps:,} steps costs the same"


def some(count: int, word: str) -> str:
    """Format a count with its noun: "1 layer", "2 layers".

    Args:
        count: The count, >= 0.
        word: The noun in the singular; its plural ends in "s".
    """
    return f"{count} {word}{'s' * (count != 1)}"


def layer_names(names: Sequence[str], order: Sequence[str]) -> str:
    """List layers in model order, with more than three adjacent ones as "first … last (n)".

    Args:
        names: The layers to list.
        order: All layers, front to back.
    """
    place = {name: i for i, name in enumerate(order)}
    known = sorted(names, key=lambda name: place.get(name, len(place)))
    groups: list[list[str]] = []
    for name in known:
        if groups and name in place and place.get(groups[-1][-1], -9) == place[name] - 1:
            groups[-1].append(name)
        else:
            groups.append([name])
    return ", ".join(f"{g[0]} … {g[-1]} ({len(g)})" if len(g) > 3 else ", ".join(g) for g in groups)
