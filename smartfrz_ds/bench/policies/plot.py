"""The CSV file and the plot of `smartfrz bench policies`."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .curves import Row, Stat, curve_at, stat
from .files import FULL, MATCHED, MATCHED_TIME, ONE

_GRID = [share / 100 for share in range(5, 80, 5)]  # saved FLOPs at which the curve of the matched runs is drawn


def to_csv(rows: Sequence[Row]) -> str:
    """Make CSV text: a header, and one line per run and setting."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: getattr(row, name) for name in names} | {"warnings": "; ".join(row.warnings)})
    return text.getvalue()


def plot(rows: Sequence[Row], file: Path) -> None:
    """Plot metric and loss over the saved FLOPs for each task, as a PNG: curves as lines, the single setting for all tasks as a mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r.task for r in rows))
    entries = list(dict.fromkeys(r.entry for r in rows if r.entry != FULL))
    figure = Figure(figsize=(4.2 * len(tasks), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    value: dict[str, Callable[[Row], float]] = {"metric, %": lambda r: 100 * r.metric, "loss": lambda r: r.loss}
    for column, task in enumerate(tasks):
        for line, (name, of) in enumerate(value.items()):
            ax = axes[line][column]
            full = stat(of(r) for r in rows if r.task == task and r.entry == FULL)
            if full.n:
                ax.axhline(full.mean, color="black", linewidth=0.8, label=FULL if column == 0 else None)
            for number, entry in enumerate(entries):
                color = f"C{number % 10}"
                groups = {
                    label: [r for r in rows if (r.task, r.entry, r.label) == (task, entry, label)]
                    for label in dict.fromkeys(r.label for r in rows if r.entry == entry)
                }
                points = {
                    label: (stat(100 * r.saved for r in same).mean, stat(of(r) for r in same)) for label, same in groups.items() if same
                }
                swept = sorted(point for label, point in points.items() if label != ONE)
                if entry in (MATCHED, MATCHED_TIME):  # each seed has lengths of its own
                    swept = _interpolated(rows, task, entry, line)
                if swept:
                    errors = [0.0 if math.isnan(s.error) else s.error for _, s in swept]
                    ax.errorbar([x for x, _ in swept], [s.mean for _, s in swept], errors, color=color, linewidth=1.2, capsize=2)
                if ONE in points:
                    x, s = points[ONE]
                    ax.plot([x], [s.mean], "o" if swept else "s", color=color, markersize=6)
                ax.plot(
                    [], [], color=color, marker="" if swept else "s", linestyle="-" if swept else "", label=entry if column == 0 else None
                )
            ax.set_title(task if line == 0 else "")
            ax.set_xlabel("training FLOPs saved, %" if line else "")
            ax.set_ylabel(name if column == 0 else "")
            ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(entries) + 1, 6), handles=axes[0][0].get_legend_handles_labels()[0])
    figure.savefig(file, dpi=110)


def _interpolated(rows: Sequence[Row], task: str, entry: str, line: int) -> list[tuple[float, Stat]]:
    """Return the curve of matched runs as the plot's points: saved FLOPs in percent, and the metric in percent (line 0) or the loss (1)."""
    full = [r for r in rows if r.task == task and r.entry == FULL]
    points = []
    for share in _GRID:
        change = curve_at(rows, task, entry, share)[line]
        if change.n:
            level, scale = (stat(r.metric for r in full).mean, 100) if line == 0 else (stat(r.loss for r in full).mean, 1)
            points.append((100 * share, Stat(scale * (level + change.mean), scale * change.error, change.n)))
    return points
