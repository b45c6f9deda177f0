"""The charts of `smartfrz report`: each as an SVG that uses the page's colours (light or dark), and as a PNG."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .events import FreezeEvent, Status
from .words import duration, size

if TYPE_CHECKING:
    from .recorded_run import RecordedRun

# The colours of the PNGs. In an SVG each is replaced by a variable of the page's style sheet.
INK, SOFT, LINE, ACTIVE, FROZEN, MARK, OWN = "#1c2330", "#5a6475", "#d8dde5", "#dbe4f0", "#2a6fbb", "#c2571a", "#b9bfc9"
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", ACTIVE: "active", FROZEN: "frozen", MARK: "mark", OWN: "own"}
_WIDTH = 9.0  # inches
# Inches around the axes. They and the range of steps are the same in all charts of a page, so that a step has one place on the page.
_RIGHT, _TOP, _BOTTOM, _LEGEND, _GAP, _LETTER, _NUMBERS = 0.85, 0.12, 0.55, 0.3, 0.22, 0.082, 0.95
_BAR = (0.12, 0.12, 1.8)  # of the colour bar: distance from the axes, width, most height, in inches
_LONGEST_NAME = 30  # letters
_MOST_METRICS = 4
_STYLE: Any = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "path.simplify": False,
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A finished chart.

    Attributes:
        name: File name without suffix, and the section's id.
        title: Heading.
        about: Explanation under the heading.
        svg: One <svg> element.
        png: Content of a PNG file.
    """

    name: str
    title: str
    about: str
    svg: str
    png: bytes


def charts(run: RecordedRun) -> list[Chart]:
    """Draw all charts for which the run's log has numbers."""
    marks = _told(run)
    made = [_frozen(run), _probabilities(run)]
    plots: list[tuple[str, str, str, Sequence[tuple[str, Callable[[Any], float | None]]], bool]] = [
        ("loss", "Loss", f"Mean over the steps since the previous point, over all ranks.{marks}", [("loss", lambda s: s.loss)], False),
        (
            "step-time",
            "Step time",
            f"Median over the steps since the previous point, without this package's own work and pauses.{marks}",
            [("seconds", lambda s: s.step_seconds)],
            True,
        ),
        (
            "optimizer",
            "Optimizer memory",
            f"Bytes of optimizer state and master weights, over all ranks.{marks}",
            [("bytes", lambda s: s.optimizer_bytes)],
            True,
        ),
        (
            "gradients",
            "Gradients sent",
            "Bytes of gradients that all ranks together pass to reductions in a step, computed from the sizes of the active parameters."
            + marks,
            [("bytes", lambda s: s.gradient_bytes)],
            True,
        ),
        (
            "savings",
            "Savings so far",
            "Fraction of the training FLOPs so far that freezing saved. Time: measured step times compared with the median step without "
            f"frozen layers, minus this package's own work and pauses.{marks}",
            [
                ("FLOPs saved, %", lambda s: 100 * s.saved_flops_fraction),
                ("time saved", lambda s: None if s.hours_saved is None else 3600 * s.hours_saved),
            ],
            False,
        ),
        (
            "metrics",
            "Observed metrics",
            f"The latest values passed to observe().{marks}",
            [(name, functools.partial(_metric, name)) for name in _metrics(run)],
            False,
        ),
        ("learning-rate", "Learning rate", f"The highest of the parameter groups.{marks}", [("learning rate", lambda s: s.lr)], True),
    ]
    made += [_lines(run, *plot) for plot in plots]
    return [chart for chart in made if chart is not None]


def _frozen(run: RecordedRun) -> Chart | None:
    names = run.layers
    if not names:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, ax = _rows(run, names, legend=True)
        end = _end(run)
        spans = run.frozen_spans()
        weights = dict(zip(names, run.starts[-1].weights, strict=True)) if run.starts else {}
        for row, name in enumerate(names):
            own = weights.get(name) == 0
            ax.broken_barh([(0, end)], (row - 0.4, 0.8), facecolor=OWN if own else ACTIVE)
            ax.broken_barh([(a, max(b - a, end / 400)) for a, b in spans.get(name, [])], (row - 0.4, 0.8), facecolor=FROZEN)
        _marks(ax, run)
        staged = _stages(ax, run)
        signs = _signs(ax, run)
        for start in run.starts[1:]:
            ax.axvline(start.step, color=INK, linewidth=0.8, linestyle=":")
        word = "would be frozen" if run.dry else "frozen"
        handles = [matplotlib.patches.Patch(color=ACTIVE, label="trains"), matplotlib.patches.Patch(color=FROZEN, label=word)]
        if 0 in weights.values():
            handles.append(matplotlib.patches.Patch(color=OWN, label="frozen by the user, or without weights"))
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
        about = "Each row is a layer, the first at the top." + (
            " Dotted: the run was resumed, or returned to a checkpoint."
            if run.rollbacks
            else " Dotted: the run was resumed."
            if run.starts[1:]
            else ""
        )
        about += _told(run) + " Black lines between rows: the borders of the pipeline's stages." * staged + signs
        return _chart("frozen", "Frozen layers", about, figure)


def _probabilities(run: RecordedRun) -> Chart | None:
    judged = [e for e in run.events if e.probabilities]
    if not judged:
        return None
    at: dict[int, dict[str, float]] = {}
    for e in judged:
        at.setdefault(e.step, {}).update(e.probabilities)
    steps = sorted(at)
    seen = {name for values in at.values() for name in values}
    names = [name for name in run.layers if name in seen]
    grid = np.array([[at[step].get(name, math.nan) for step in steps] for name in names])  # (layers, stages)
    # A cell extends from the previous stage to its own. The first one, and one after a gap, has the usual width.
    usual = float(np.median(np.diff(steps))) if len(steps) > 1 else max(1.0, steps[0] / 10)
    cells = [(max(left, step - 1.5 * usual), step) for left, step in zip([steps[0] - usual, *steps[:-1]], steps, strict=True)]
    with matplotlib.rc_context(_STYLE):
        figure, ax = _rows(run, names)
        # One hue with the probability as opacity, which is readable on light and dark pages.
        colors = ListedColormap([(*to_rgb(FROZEN), 0.1 + 0.9 * i / 255) for i in range(256)])
        edges = np.arange(len(names) + 1) - 0.5
        mesh: Any = None
        for column, (left, right) in enumerate(cells):
            values = np.ma.masked_invalid(grid[:, column : column + 1])
            mesh = ax.pcolormesh([left, right], edges, values, cmap=colors, vmin=0, vmax=1, rasterized=True)
        about = "The policy's probability, at each freezing stage, that a layer has converged. Empty: not judged, or no longer."
        box, (width, height) = ax.get_position(), figure.get_size_inches()
        bar_height = min(_BAR[2] / height, box.height)
        place = (box.x1 + _BAR[0] / width, box.y1 - bar_height, _BAR[1] / width, bar_height)
        bar = figure.colorbar(mesh, cax=figure.add_axes(place), ticks=[0, 0.5, 1])
        bar.outline.set_visible(False)
        threshold = run.starts[-1].threshold if run.starts else None
        if threshold is not None:
            bar.ax.axhline(threshold, color=MARK, linewidth=1.6)
            bar.set_ticks([tick for tick in (0, 0.5, 1) if abs(tick - threshold) > 0.12] + [threshold])
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda p, _: f"{p:.3g}"))
            reached = [
                ((left + right) / 2, row) for i, (left, right) in enumerate(cells) for row in range(len(names)) if grid[row, i] >= threshold
            ]
            ax.scatter(*zip(*reached, strict=True), s=max(1.0, min(9.0, 700 / len(names))), color=MARK, zorder=3) if reached else None
            about += f" Dots and the line in the scale: at least the threshold of {threshold:.3g}."
        _marks(ax, run)
        about += _told(run)
        return _chart("probabilities", "Probabilities", about, figure)


def _lines(
    run: RecordedRun, name: str, title: str, about: str, series: Sequence[tuple[str, Callable[[Any], float | None]]], zero: bool
) -> Chart | None:
    """One panel per series, one below the other; None where no status has a number for any. zero: the axis starts at 0."""
    values = [(label, [math.nan if (v := of(s)) is None else float(v) for s in run.statuses]) for label, of in series]
    # A series without any number is left out, and one of zero bytes: a single process sends no gradients.
    values = [(label, n) for label, n in values if not all(math.isnan(x) or (label == "bytes" and x == 0) for x in n)]
    if not values:
        return None
    steps = [s.step for s in run.statuses]
    with matplotlib.rc_context(_STYLE):
        figure, panels = _figure(run, 1.85, count=len(values))
        for ax, (label, numbers) in zip(panels, values, strict=True):
            _marks(ax, run)
            if label == "seconds":  # a median describes the steps before its point
                ax.step([run.starts[0].step if run.starts else 0, *steps], [numbers[0], *numbers], where="pre", color=FROZEN, linewidth=1.6)
            elif label == "bytes":  # bytes are constant until something is frozen
                ax.step([*steps, run.last_step], [*numbers, numbers[-1]], where="post", color=FROZEN, linewidth=1.6)
            else:
                ax.plot(steps, numbers, color=FROZEN, linewidth=1.6, marker="o" if len(steps) < 30 else "", markersize=3)
            low, high = np.nanmin(numbers), np.nanmax(numbers)
            if zero:
                ax.set_ylim(0, 1.08 * high or 1.0)
            elif high == low:
                ax.set_ylim(low - 0.5, high + 0.5)
            ax.grid(axis="y", linewidth=0.7)
            ax.set_axisbelow(True)
            ax.set_ylabel(label)
            ax.tick_params(length=0)
            ax.yaxis.set_major_locator(MaxNLocator(5))
            if label == "bytes":
                ax.set_ylabel("")
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: size(y) if y else "0"))
            if label in ("seconds", "time saved"):
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: duration(y) if y else "0"))
        return _chart(name, title, about, figure)


def _metrics(run: RecordedRun) -> list[str]:
    """Names of the observed metrics, without a loss that has its own chart."""
    named = dict.fromkeys(name for s in run.statuses for name in s.metrics)
    return [name for name in named if name != "loss"][:_MOST_METRICS]


def _metric(name: str, status: Status) -> float | None:
    return status.metrics.get(name)


def _told(run: RecordedRun) -> str:
    """Describe the lines of `_marks`; empty where there are none."""
    kinds = {e.kind for e in run.changes()}
    return " Lines mark the freezes" * bool(kinds) + (" (dashed: thaws)." if "thaw" in kinds else "." if kinds else "")


def _marks(ax: Any, run: RecordedRun) -> None:
    for e in run.changes():
        ax.axvline(e.step, color=MARK, linewidth=0.7, linestyle="-" if e.kind == "freeze" else "--")


def _stages(ax: Any, run: RecordedRun) -> bool:
    """Draw the borders of a pipeline's stages over the steps in which they were there. Returns whether there are any."""
    if not run.starts or not run.starts[-1].bounds:
        return False
    entries = run.starts[-1].entries
    cuts = [(r.step, r.bounds) for r in run.live if not isinstance(r, Status) and r.bounds]
    for (step, bounds), (end, _) in pairwise([*cuts, (_end(run), ())]):
        for border in bounds[1:-1]:
            row = sum(entry < border for entry in entries) - 0.5
            ax.plot([step, end], [row, row], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=4)
    return True


def _signs(ax: Any, run: RecordedRun) -> str:
    """Mark the guard's thaws and the prefix cache's events at the top of the chart, and describe the signs."""
    events = [e for e in run.live if isinstance(e, FreezeEvent)]
    guard = [e.step for e in events if e.kind == "thaw" and any(r.startswith("guard:") for r in e.reasons.values())]
    cache = [e.step for e in events if e.kind == "cache"]
    for steps, marker, color in ((guard, "X", MARK), (cache, "v", INK)):
        ax.plot(steps, [-0.5] * len(steps), linestyle="", marker=marker, color=color, markersize=6, clip_on=False, zorder=5)
    return " Crosses at the top: the guard thawed." * bool(
        guard
    ) + " Triangles: the prefix cache was set up, proven or left (see the table)." * bool(cache)


def _end(run: RecordedRun) -> int:
    """Last step of every chart's axis: of the run, or of a stage that a rollback has undone."""
    return max(run.last_step, 1, *(e.step for e in run.events if e.probabilities))


def _figure(run: RecordedRun, height: float, *, count: int = 1, top: float = _TOP) -> tuple[Figure, Sequence[Any]]:
    """Make a figure whose axis of steps has the same place and range as in every other chart of the run.

    Args:
        run: The run.
        height: Height of each panel, in inches.
        count: Number of panels, one below the other.
        top: Space above them, in inches.
    """
    whole = top + count * height + (count - 1) * _GAP + _BOTTOM
    figure = Figure(figsize=(_WIDTH, whole))
    FigureCanvasAgg(figure)
    left = max(_NUMBERS, 0.15 + _LETTER * max((len(_short(name)) for name in run.layers), default=0))
    panels = []
    for i in range(count):
        bottom = _BOTTOM + (count - 1 - i) * (height + _GAP)
        ax = figure.add_axes((left / _WIDTH, bottom / whole, (_WIDTH - left - _RIGHT) / _WIDTH, height / whole))
        ax.set_xlim(0, _end(run))
        _step_axis(ax)
        if i < count - 1:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
        panels.append(ax)
    return figure, panels


def _rows(run: RecordedRun, names: Sequence[str], *, legend: bool = False) -> tuple[Figure, Any]:
    """Make a figure with one row per layer, the first at the top. With many layers only some are labelled."""
    count = len(names)
    row = min(0.24, max(0.17, 6 / count)) if count <= 80 else 14 / count  # inches
    figure, (ax,) = _figure(run, row * max(count, 3), top=_LEGEND + _TOP if legend else _TOP)
    every = max(1, math.ceil(0.165 / row))
    ax.set_yticks(range(0, count, every), [_short(name) for name in names[::every]])
    ax.set_ylim(max(count, 3) - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.tick_params(axis="y", labelcolor=INK, labelsize=9)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return figure, ax


def _step_axis(ax: Any) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 3]}…{name[-(_LONGEST_NAME - _LONGEST_NAME // 3 - 1) :]}"


def _chart(name: str, title: str, about: str, figure: Figure) -> Chart:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=110, facecolor="white")
    # Salt: the ids of all charts must differ, as they are on one page.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # figure_1, axes_1, … are the same in every chart
    text = text.replace("font-family: 'DejaVu Sans'; ", "")  # use the page's font: this one may not be installed
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', text, count=1)
    return Chart(name=name, title=title, about=about, svg=text, png=png.getvalue())
