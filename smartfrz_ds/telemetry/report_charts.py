"""The charts of `smartfrz report`: each as an SVG that uses the page's colours (light or dark), and as a PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .words import size

if TYPE_CHECKING:
    from .recorded_run import RecordedRun

# The colours of the PNGs. In an SVG each is replaced by a variable of the page's style sheet.
INK, SOFT, LINE, ACTIVE, FROZEN, MARK, OWN = "#1c2330", "#5a6475", "#d8dde5", "#dbe4f0", "#2a6fbb", "#c2571a", "#b9bfc9"
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", ACTIVE: "active", FROZEN: "frozen", MARK: "mark", OWN: "own"}
_WIDTH = 9.0  # inches
_LONGEST_NAME = 30  # letters
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
    kinds = {e.kind for e in run.changes()}
    marks = " Lines mark the freezes" * bool(kinds) + (" (dashed: thaws)." if "thaw" in kinds else "." if kinds else "")
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
            "Fraction of the training FLOPs so far that freezing saved. Hours: measured step times compared with the median step without "
            f"frozen layers, minus this package's own work and pauses.{marks}",
            [("FLOPs saved, %", lambda s: 100 * s.saved_flops_fraction), ("hours saved", lambda s: s.hours_saved)],
            False,
        ),
        ("learning-rate", "Learning rate", "The highest of the parameter groups.", [("learning rate", lambda s: s.lr)], True),
    ]
    made += [_lines(run, *plot) for plot in plots]
    return [chart for chart in made if chart is not None]


def _frozen(run: RecordedRun) -> Chart | None:
    names = run.layers
    if not names:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, ax = _rows(names)
        end = max(run.last_step, 1)
        spans = run.frozen_spans()
        weights = dict(zip(names, run.starts[-1].weights, strict=True)) if run.starts else {}
        for row, name in enumerate(names):
            own = weights.get(name) == 0
            ax.broken_barh([(0, end)], (row - 0.4, 0.8), facecolor=OWN if own else ACTIVE)
            ax.broken_barh([(a, max(b - a, end / 400)) for a, b in spans.get(name, [])], (row - 0.4, 0.8), facecolor=FROZEN)
        for start in run.starts[1:]:
            ax.axvline(start.step, color=INK, linewidth=0.8, linestyle=":")
        ax.set_xlim(0, end)
        word = "would be frozen" if run.dry else "frozen"
        handles = [matplotlib.patches.Patch(color=ACTIVE, label="trains"), matplotlib.patches.Patch(color=FROZEN, label=word)]
        if 0 in weights.values():
            handles.append(matplotlib.patches.Patch(color=OWN, label="frozen by the user, or without weights"))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
        about = "Each row is a layer, the first at the top." + (
            " Dotted: the run was resumed, or returned to a checkpoint."
            if run.rollbacks
            else " Dotted: the run was resumed."
            if run.starts[1:]
            else ""
        )
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
        figure, ax = _rows(names)
        # One hue with the probability as opacity, which is readable on light and dark pages.
        colors = ListedColormap([(*to_rgb(FROZEN), 0.1 + 0.9 * i / 255) for i in range(256)])
        edges = np.arange(len(names) + 1) - 0.5
        mesh: Any = None
        for column, (left, right) in enumerate(cells):
            values = np.ma.masked_invalid(grid[:, column : column + 1])
            mesh = ax.pcolormesh([left, right], edges, values, cmap=colors, vmin=0, vmax=1, rasterized=True)
        ax.set_xlim(0, max(run.last_step, steps[-1]))
        bar = figure.colorbar(mesh, ax=ax, pad=0.015, aspect=max(10, 1.4 * len(names)), ticks=[0, 0.5, 1])
        bar.outline.set_visible(False)
        about = "The policy's probability, at each freezing stage, that a layer has converged. Empty: not judged, or no longer."
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
        figure = Figure(figsize=(_WIDTH, 0.6 + 2.0 * len(values)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (label, numbers) in zip(panels, values, strict=True):
            for e in run.changes():
                ax.axvline(e.step, color=MARK, linewidth=0.7, linestyle="-" if e.kind == "freeze" else "--")
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
            ax.set_xlim(0, max(run.last_step, 1))
            ax.grid(axis="y", linewidth=0.7)
            ax.set_axisbelow(True)
            ax.set_ylabel(label)
            ax.tick_params(length=0)
            ax.yaxis.set_major_locator(MaxNLocator(5))
            if label == "bytes":
                ax.set_ylabel("")
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: size(y) if y else "0"))
        _step_axis(panels[-1])
        return _chart(name, title, about, figure)


def _rows(names: Sequence[str]) -> tuple[Figure, Any]:
    """Make a figure with one row per layer, the first at the top. With many layers only some are labelled."""
    count = len(names)
    row = min(0.24, max(0.17, 6 / count)) if count <= 80 else 14 / count  # inches
    figure = Figure(figsize=(_WIDTH, 0.95 + row * max(count, 3)), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    every = max(1, math.ceil(0.165 / row))
    ax.set_yticks(range(0, count, every), [_short(name) for name in names[::every]])
    ax.set_ylim(max(count, 3) - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.tick_params(axis="y", labelcolor=INK, labelsize=9)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    _step_axis(ax)
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
