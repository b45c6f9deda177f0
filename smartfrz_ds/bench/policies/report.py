"""The tables of `smartfrz bench policies`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from .curves import Row, Stat, against_curve, against_full, curve_at, over_tasks, stat
from .files import FULL, MATCHED, MATCHED_TIME, ONE
from .judge import Interval, Pair, over_groups, pairs, verdicts

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
    freezing = [e for e in entries if e not in (MATCHED, MATCHED_TIME)]
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
    for judge, cost in ((MATCHED, "FLOPs"), (MATCHED_TIME, "wall time")):
        found = {setting: pairs(rows, *setting, judge) for setting in _settings(rows, freezing)}
        if any(found.values()):
            parts += _judged(found, {r.task: r for r in rows}, cost)
    baselines = [e for e in BASELINES if e in curves]
    for baseline in baselines:
        parts += [
            f"## Compared with `{baseline}` at the same saved FLOPs",
            f"Each run minus the curve of `{baseline}` with the same seed at this run's saving. Runs that saved more than the curve reaches"
            " are left out; a cell is empty if all of its runs are.",
            _compared(rows, tasks, [e for e in freezing if e != baseline], baseline),
        ]
    parts += ["## All settings", _details(rows, tasks, freezing)]
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


def _judged(found: dict[tuple[str, str], dict[str, list[Pair]]], tasks: dict[str, Row], cost: str) -> list[str]:
    """Make the section on the comparison with matched runs. tasks: any run of each task."""
    groups = {
        "looked at once, pretrained": [t for t, r in tasks.items() if r.use == "once" and r.pretrained],
        "looked at once, from scratch": [t for t, r in tasks.items() if r.use == "once" and not r.pretrained],
        "design, pretrained": [t for t, r in tasks.items() if r.use == "design" and r.pretrained],
        "design, from scratch": [t for t, r in tasks.items() if r.use == "design" and not r.pretrained],
        "all tasks": list(tasks),
    }
    groups = {name: members for name, members in groups.items() if members}
    means, losses, each = [], [], []
    for (entry, label), by_task in found.items():
        if not by_task:
            continue
        name = f"`{entry}` {label}"
        grouped = {g: [by_task[t] for t in members if t in by_task] for g, members in groups.items()}
        means.append([name, *(_mean_cell([[p.metric for p in ps] for ps in g], grouped[n], groups[n]) for n, g in grouped.items())])
        losses.append([name, *(_mean_cell([[p.loss for p in ps] for ps in g], grouped[n], groups[n]) for n, g in grouped.items())])
        better, worse = verdicts({t: [p.metric for p in ps] for t, ps in by_task.items()})
        lower, higher = verdicts({t: [-p.loss for p in ps] for t, ps in by_task.items()})
        counts = [f"{len(x)} of {len(by_task)}" for x in (better, worse, lower, higher)]
        cells = [
            f"{_points(stat(p.metric for p in by_task[t]))} / {_points(stat(p.loss for p in by_task[t]), ' %', 1)}"
            f" ({100 * mean(p.run.saved for p in by_task[t]):.0f} %)"
            if t in by_task
            else ""
            for t in tasks
        ]
        each.append([name, *counts, *cells])
    return [
        f"## Compared with the matched run ({cost})",
        f"Each freezing run minus its matched run: full training with the same seed, its schedule shortened to the same {cost}."
        " Mean over the tasks with the 95 % interval (Student, paired by seed, degrees of freedom after Welch and Satterthwaite), then the"
        " saved FLOPs. A run that saves nothing is its own matched run. Metric, in points:",
        _table(["setting", *groups], means),
        "Loss, in percent of the loss of full training; below 0 the freezing run is better:",
        _table(["setting", *groups], losses),
        "By task: metric / loss (saved FLOPs), ± is the standard error. In front: on how many tasks the freezing run is better and worse"
        " than its matched run at an error rate of 5 % for all tasks together (paired t-tests, Holm's correction).",
        _table(["setting", "metric better", "worse", "loss lower", "higher", *tasks], each),
    ]


def _mean_cell(values: Sequence[Sequence[float]], pairs_of: Sequence[Sequence[Pair]], members: Sequence[str]) -> str:
    """Format a mean over tasks, its interval, the saving, and the number of tasks where it is not all of them."""
    if not values:
        return ""
    part = "" if len(values) == len(members) else f", {len(values)} of {len(members)} tasks"
    return f"{_interval(over_groups(values))} ({100 * mean(mean(p.run.saved for p in ps) for ps in pairs_of):.0f} %{part})"


def _interval(i: Interval) -> str:
    return f"{100 * i.mean:+.2f}" + ("" if math.isnan(i.low) else f" [{100 * i.low:+.2f}, {100 * i.high:+.2f}]")


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
