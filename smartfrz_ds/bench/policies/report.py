"""The tables, CSV file and plot of `smartfrz bench policies`."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from .curves import Row, Stat, against_curve, against_full, curve_at, over_tasks, stat
from .files import FULL, ONE

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # fractions of saved FLOPs at which the curves are compared
BASELINES = ("linear", "late")  # all settings are compared with their curves at equal FLOPs


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The cost of the benchmark itself.

    Attributes:
        done, planned: Number of runs.
        run_seconds: Sum over the runs.
        wall_seconds: Wall time of the calls that ran something.
        calls: Number of these calls.
        workers: The largest number of parallel processes.
        machine: Description of the machine.
    """

    done: int
    planned: int
    run_seconds: float
    wall_seconds: float
    calls: int
    workers: int
    machine: str


# --- tables ----------------------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], effort: Effort) -> str:
    """Make all tables, as Markdown."""
    tasks = list(dict.fromkeys(r.task for r in rows))
    entries = list(dict.fromkeys(r.entry for r in rows if r.entry != FULL))
    parts = [
        "# Policies at equal cost",
        "Metric: accuracy on held-out inputs in percent; differences in percentage points. Loss: cross-entropy there. Saved: fraction of"
        " the training FLOPs, forward and backward. Differences are to full training with the same seed; ± is the standard error over"
        " seeds (over all tasks: of the mean of the task means).",
        _time(effort),
        "## Full training",
        _full(rows, tasks),
        "## One setting for all tasks",
        _one(rows, tasks, entries),
        "Loss, relative to full training:",
        _one_loss(rows, tasks, entries),
    ]
    curves = [e for e in entries if any(r.entry == e and r.label != ONE for r in rows)]
    if curves:
        parts += ["## Curves: change of the metric at the same saved FLOPs", _curves(rows, tasks, curves)]
    baselines = [e for e in BASELINES if e in curves]
    for baseline in baselines:
        parts += [
            f"## Compared with `{baseline}` at the same saved FLOPs",
            f"Each run minus the curve of `{baseline}` with the same seed at this run's saving. Runs that saved more than the curve reaches"
            " are left out; a cell is empty if all of its runs are.",
            _compared(rows, tasks, [e for e in entries if e != baseline], baseline),
        ]
    parts += ["## All settings", _details(rows, tasks, entries)]
    warned = sorted({f"{r.entry} on {r.task}: {text}" for r in rows for text in r.warnings})
    if warned:
        parts += ["## Warnings of the runs", "\n".join(f"- {text}" for text in warned)]
    return "\n\n".join(parts) + "\n"


def _time(effort: Effort) -> str:
    text = f"{effort.done} of {effort.planned} runs, {effort.run_seconds / 60:.1f} minutes of one worker in total ({effort.machine}"
    if effort.calls:
        calls = f"{effort.calls} call{'s' if effort.calls > 1 else ''}"
        text += f"; {effort.workers} workers; {calls}, {effort.wall_seconds / 60:.1f} minutes of wall time"
    return text + ")."


def _full(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    lines = []
    for task in tasks:
        mine = [r for r in rows if r.task == task and r.entry == FULL]
        if mine:
            sizes = [str(len(mine)), str(mine[0].steps), str(mine[0].layers)]
            lines.append([task, _percent(stat(r.metric for r in mine)), _loss(stat(r.loss for r in mine)), *sizes, *_costs(mine)])
    return _table(["task", "metric", "loss", "seeds", "steps", "layers", "GFLOP", "wall, s", "CPU, s"], lines)


def _one(rows: Sequence[Row], tasks: Sequence[str], entries: Sequence[str]) -> str:
    lines = []
    for entry in entries:
        mine = {task: [r for r in rows if r.task == task and r.entry == entry and r.label == ONE] for task in tasks}
        changes = {task: against_full(rows, mine[task])[0] for task in tasks}
        known = {task: change for task, change in changes.items() if change.n}
        if not known:
            continue
        worst = min(known, key=lambda task: known[task].mean)
        cells = [
            f"{_points(changes[t])} ({100 * mean(r.saved for r in mine[t]):.0f} %)" if changes[t].n else "" for t in tasks
        ]  # change (saved)
        saved = mean(mean(r.saved for r in mine[t]) for t in known)
        summary = [_points(over_tasks(known.values())), f"{100 * saved:.0f} %", f"{100 * known[worst].mean:+.2f} ({worst})"]
        lines.append([f"`{entry}`", *summary, _speed(rows, mine), *cells])
    return _table(["policy", "mean change", "saved", "worst task", "CPU time", *tasks], lines)


def _speed(rows: Sequence[Row], mine: dict[str, list[Row]]) -> str:
    """CPU time relative to full training with the same seed, averaged over the tasks."""
    full = {(r.task, r.seed): r.cpu_seconds for r in rows if r.entry == FULL}
    ratios = [[r.cpu_seconds / full[r.task, r.seed] for r in runs if (r.task, r.seed) in full] for runs in mine.values()]
    return f"{mean(mean(x) for x in ratios if x):.2f}"


def _one_loss(rows: Sequence[Row], tasks: Sequence[str], entries: Sequence[str]) -> str:
    full = {task: stat(r.loss for r in rows if r.task == task and r.entry == FULL).mean for task in tasks}
    lines = []
    for entry in entries:
        changes = []
        for task in tasks:
            change = against_full(rows, [r for r in rows if r.task == task and r.entry == entry and r.label == ONE])[1]
            changes.append(Stat(change.mean / full[task], change.error / full[task], change.n))
        if any(change.n for change in changes):
            lines.append([f"`{entry}`", *(_points(change, " %", 1) for change in (over_tasks(changes), *changes))])
    return _table(["policy", "mean", *tasks], lines)


def _curves(rows: Sequence[Row], tasks: Sequence[str], entries: Sequence[str]) -> str:
    lines = []
    for task in tasks:
        lines += [[task, f"`{e}`", *(_points(curve_at(rows, task, e, share)[0]) for share in SHARES)] for e in entries]
    for e in entries:
        stats = [[curve_at(rows, task, e, share)[0] for task in tasks] for share in SHARES]
        # A mean over tasks is meaningful only if all of them are included.
        lines.append(["**all tasks**", f"`{e}`", *(_points(over_tasks(s)) if all(x.n for x in s) else "" for s in stats)])
    return _table(["task", "policy", *(f"{100 * share:.0f} % saved" for share in SHARES)], lines)


def _compared(rows: Sequence[Row], tasks: Sequence[str], entries: Sequence[str], baseline: str) -> str:
    lines = []
    for entry, label in _settings(rows, entries):
        mine = {task: [r for r in rows if (r.task, r.entry, r.label) == (task, entry, label)] for task in tasks}
        changes = {task: against_curve(rows, mine[task], baseline) for task in tasks}
        if not any(metric.n for metric, _ in changes.values()):
            continue
        full = {task: stat(r.loss for r in rows if r.task == task and r.entry == FULL).mean for task in tasks}
        losses = [Stat(c.mean / full[t], c.error / full[t], c.n) for t, (_, c) in changes.items() if c.n]
        left_out = [t for t in tasks if mine[t] and changes[t][0].n < len(mine[t])]
        lines.append(
            [f"`{entry}` {label}", _points(over_tasks(m for m, _ in changes.values())) + (" (in part)" if left_out else "")]
            + [_points(over_tasks(losses), " %", 1)]
            + [f"{_points(changes[t][0])} ({100 * mean(r.saved for r in mine[t]):.0f} %)" if changes[t][0].n else "" for t in tasks]
        )
    return _table(["setting", "mean difference", "loss, relative", *tasks], lines)


def _details(rows: Sequence[Row], tasks: Sequence[str], entries: Sequence[str]) -> str:
    lines = []
    for task in tasks:
        for entry, label in _settings(rows, [FULL, *entries]):
            mine = [r for r in rows if (r.task, r.entry, r.label) == (task, entry, label)]
            if not mine:
                continue
            metric, loss = against_full(rows, mine)
            starts = [r.first_freeze / r.steps for r in mine if r.first_freeze is not None]
            lines.append(
                [
                    task,
                    f"`{entry}`" if entry == FULL else f"`{entry}` {label}",
                    str(len(mine)),
                    _points(stat(r.saved for r in mine), " %", 1, sign=False),
                    _percent(stat(r.metric for r in mine)),
                    _points(metric),
                    _loss(stat(r.loss for r in mine)),
                    _loss(loss, sign=True),
                    f"{mean(r.frozen for r in mine):.1f} of {mine[0].layers}",
                    f"{100 * mean(starts):.0f} %" if starts else "never",
                    *_costs(mine),
                ]
            )
    head = ["task", "setting", "seeds", "saved", "metric", "change", "loss", "change", "frozen", "first at", "GFLOP", "wall, s", "CPU, s"]
    return _table(head, lines)


def _costs(runs: Sequence[Row]) -> list[str]:
    """Mean FLOPs, wall time and CPU time of the training."""
    return [f"{mean(r.flops for r in runs) / 1e9:.0f}", f"{mean(r.seconds for r in runs):.1f}", f"{mean(r.cpu_seconds for r in runs):.1f}"]


def _settings(rows: Sequence[Row], entries: Sequence[str]) -> list[tuple[str, str]]:
    seen = dict.fromkeys((r.entry, r.label) for r in rows)
    return [pair for entry in entries for pair in seen if pair[0] == entry]


def _points(s: Stat, unit: str = "", digits: int = 2, *, sign: bool = True) -> str:
    if not s.n:
        return ""
    error = "" if math.isnan(s.error) else f" ± {100 * s.error:.{digits}f}"
    return f"{100 * s.mean:{'+' if sign else ''}.{digits}f}{error}{unit}"


def _percent(s: Stat) -> str:
    return _points(s, sign=False)


def _loss(s: Stat, *, sign: bool = False) -> str:
    if not s.n:
        return ""
    return f"{s.mean:{'+' if sign else ''}.4f}" + ("" if math.isnan(s.error) else f" ± {s.error:.4f}")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


# --- files -----------------------------------------------------------------------------------------------------------------------


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
                    label: [r for r in rows if (r.task, r.entry, r.label) == (task, entry, label)] for _, label in _settings(rows, [entry])
                }
                points = {
                    label: (stat(100 * r.saved for r in same).mean, stat(of(r) for r in same)) for label, same in groups.items() if same
                }
                swept = sorted(point for label, point in points.items() if label != ONE)
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
