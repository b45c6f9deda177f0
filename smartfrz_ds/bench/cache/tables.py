"""The table of `smartfrz bench cache`'s cells."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from .cells import BLOCKS, COPIES, ENGINE_NAMES, RANKS, Cell

PARTS = ("forward", "backward", "step")


class Times(NamedTuple):
    """Seconds of a step: medians over the steps in which all ranks skipped the frozen layers.

    Attributes:
        full: Nothing frozen.
        frozen: A frozen prefix.
        cached: A frozen prefix that is skipped.
        prefix: Forward of the frozen prefix, in the frozen copy.
        from_frozen: Prediction: the frozen step without `prefix`.
        from_full: Prediction: the full step without forward and backward of the prefix, and without its share (by weights) of the
            optimizer's step and of what the engine does after the last gradient.
        steps: Number of these steps.
    """

    full: float
    frozen: float
    cached: float
    prefix: float
    from_frozen: float
    from_full: float
    steps: int


def times_of(result: dict[str, Any]) -> Times | None:
    """Return the times of a cell; None if there was no step in which all ranks skipped the frozen layers."""
    ranks = RANKS[Cell.of(result["cell"]).engine]
    found = [s["seconds"] for s in result["steps"] if s["full"] and s["epoch"] and s["hits"] == ranks]
    if not found:
        return None
    whole = {kind: median(_sum(s[kind]) for s in found) for kind in COPIES}
    prefix = median(s["frozen"]["prefix"] for s in found)
    idle = 1 - result["active"]
    skipped = ((s["full"]["prefix"] + s["full"]["prefix_backward"], s["full"]["rest_backward"] + s["full"]["step"]) for s in found)
    saved = [layers + idle * rest for layers, rest in skipped]
    return Times(
        **whole,
        prefix=prefix,
        from_frozen=median(_sum(s["frozen"]) - s["frozen"]["prefix"] for s in found),
        from_full=median(_sum(s["full"]) - less for s, less in zip(found, saved, strict=True)),
        steps=len(found),
    )


class Hits(NamedTuple):
    """Full batches of all ranks from the second epoch on.

    Attributes:
        batches: Their number.
        back: Those of them all of whose rows have been in a full batch before.
        hits: Those that skipped the frozen layers.
    """

    batches: int
    back: int
    hits: int


def hits_of(result: dict[str, Any]) -> Hits:
    """Count the hits of a cell."""
    ranks = RANKS[Cell.of(result["cell"]).engine]
    found = [s for s in result["steps"] if s["full"] and s["epoch"]]
    return Hits(ranks * len(found), sum(s["rows_back"] for s in found), sum(s["hits"] for s in found))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Make the table of these results, as Markdown."""
    lines = [
        "Medians, in ms, over the steps in which all ranks skipped the frozen layers; the copies take turns. Prefix: the forward of the",
        "frozen layers. Predicted, first number: the frozen step without it; second number: the full step without forward and backward of",
        "the frozen layers, and without their share, by weights, of the optimizer and of the reduction after the last gradient. Hits: of",
        "the full batches from the second epoch on all of whose rows had been in a full batch before (in brackets: of all full batches).",
        "",
        "| net | engine | frozen blocks | full | frozen (÷ full) | prefix | cached (÷ full) | predicted | ÷ predicted | hits | equal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(r) for r in results)]) + "\n"


def _line(result: dict[str, Any]) -> str:
    cell = Cell.of(result["cell"])
    start = f"| {cell.net} | {ENGINE_NAMES[cell.engine]} | {cell.blocks} of {BLOCKS[cell.net]} |"
    if "reason" in result:
        return f"{start} {result['reason']} {'| ' * 7}|"
    times, hits = times_of(result), hits_of(result)
    counted = f"{hits.hits} of {hits.back} ({hits.batches})"
    equal = "yes" if result["equal"] else "**no**"
    if times is None:
        return f"{start} no step skipped the frozen layers: {result['note']} {'| ' * 5}| {counted} | {equal} |"
    cells = [
        _ms(times.full),
        f"{_ms(times.frozen)} ({times.frozen / times.full:.2f})",
        _ms(times.prefix),
        f"**{_ms(times.cached)}** ({times.cached / times.full:.2f})",
        f"{_ms(times.from_frozen)}, {_ms(times.from_full)}",
        f"**{times.cached / times.from_frozen:.2f}**, {times.cached / times.from_full:.2f}",
        counted,
        equal,
    ]
    return f"{start} {' | '.join(cells)} |"


def _sum(seconds: dict[str, float]) -> float:
    return sum(seconds[part] for part in PARTS)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"
