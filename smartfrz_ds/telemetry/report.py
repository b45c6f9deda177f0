"""`smartfrz report`: one self-contained HTML page, and PNGs, made from a run's log.

Text and tables are made here, charts in report_charts.py; report.html is the page's template.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from statistics import median

from .events import WEIGHTS_ONLY, FreezeEvent, RunStart, Status
from .recorded_run import RecordedRun, find_log, load_run
from .words import duration, layer_names, matched, size, some

MOST_ROWS = 400  # of the table of events


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write report.html, and its charts as separate PNGs.

    Args:
        run_dir: A folder with one log in it, or the log.
        output: Folder for the files, created if missing; None: RUN_DIR/report.

    Returns:
        The path of report.html, which does not need the PNGs.

    Raises:
        ValueError: No log, several logs, or one without a record.
        ModuleNotFoundError: matplotlib is not installed (extra "report").
    """
    log = find_log(Path(run_dir))
    run = load_run(log)
    from .report_charts import charts  # here: matplotlib takes most of a second, and a wrong path is reported without it

    folder = Path(output) if output is not None else log.parent / "report"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for chart in charts(run):
        (folder / f"{chart.name}.png").write_bytes(chart.png)
        parts.append(
            f'<section id="{chart.name}"><h2>{_text(chart.title)}</h2><p class="about">{_text(chart.about)}</p>'
            f'<div class="chart">{chart.svg}</div></section>'
        )
    frame = files("smartfrz_ds.telemetry").joinpath("report.html").read_text(encoding="utf-8")
    filled = {
        "TITLE": _text(f"Freezing in {log.parent.resolve().name or log.name}"),
        "FACTS": _facts(run, log),
        "SUMMARY": "".join(f"<p>{_text(line)}</p>" for line in summary(run)),
        "WARNINGS": _warnings(run),
        "CHARTS": "\n".join(parts),
        "EVENTS": _table(run),
    }
    for key, value in filled.items():
        frame = frame.replace(f"<!--{key}-->", value)
    page = folder / "report.html"
    page.write_text(frame, encoding="utf-8")
    return page


# --- words -----------------------------------------------------------------------------------------------------------------------


def summary(run: RecordedRun) -> list[str]:
    """Describe the run in a few sentences."""
    total = run.starts[-1].total_steps if run.starts else None
    frozen, count = run.frozen, len(run.layers)
    at = f"step {run.last_step:,}" + (f" of {total:,}" if total else "")
    if run.dry:
        lines = [f"A dry run: nothing was frozen. By {at} the policy would have frozen {_layers(len(frozen), count)}."]
    elif frozen:
        lines = [f"At {at}, {_layers(len(frozen), count)} {'is' if len(frozen) == 1 else 'are'} frozen: {layer_names(frozen, run.layers)}."]
    else:
        lines = [f"At {at}, none of {count} layers is frozen." if run.starts else f"At {at}, no layer is frozen."]
    what, _, cache = run.outcome().partition("; prefix cache: ")
    lines.append(f"What froze, or why not: {what}.")
    if cache:
        lines.append(f"The prefix cache: {cache}.")
    if run.last_load is not None:
        lines.append(f"After that, {_loaded(run.last_load, run.layers)}.")
    if run.rollbacks:
        lines.append(f"The run returned to an earlier checkpoint {some(run.rollbacks, 'time')}; the charts leave out the undone steps.")
    if run.statuses:
        lines.append(_savings(run))
        lines += _before_and_after(run)
    changes = [e for e in run.events if e.kind in ("freeze", "thaw")]  # those undone by a rollback stopped training too
    if changes:
        seconds = sum(e.seconds for e in changes)
        thaws = sum(e.kind == "thaw" for e in changes)
        text = f"{some(len(changes) - thaws, 'freeze')}" + (f" and {some(thaws, 'thaw')}" if thaws else "")
        lines.append(f"{text} stopped training for {duration(seconds)} in total, {duration(max(e.seconds for e in changes))} at most.")
    guarded = [e for e in changes if e.kind == "thaw" and any(r.startswith("guard:") for r in e.reasons.values())]
    if guarded:
        lines.append(f"The guard undid {some(len(guarded), 'freeze')} because the metric had become worse (see the table).")
    undone = sum(e.kind == "undone" for e in run.events)
    if undone:
        lines.append(f"{some(undone, 'change')} failed and {'was' if undone == 1 else 'were'} undone; training went on (see the table).")
    return lines


def _loaded(load: FreezeEvent, order: Sequence[str]) -> str:
    frozen = f"{_layers(len(load.frozen), len(order))} frozen" + (f": {layer_names(load.frozen, order)}" if load.frozen else "")
    if load.message.endswith(WEIGHTS_ONLY):
        return f"the weights of {load.message.removesuffix(WEIGHTS_ONLY)} were loaded"
    return f"{load.message} of step {load.step:,} was loaded, with {frozen}"


def _savings(run: RecordedRun) -> str:
    last = run.statuses[-1]
    share = last.saved_flops_fraction
    text = f"{100 * share:.1f} % of the training FLOPs so far were saved ({matched(last.step, share)})"
    if last.hours_saved is None:
        return text + "; the time saved is unknown, because no step without frozen layers was timed."
    hours = last.hours_saved
    return (
        text
        + f", and an estimated {_hours(hours)} "
        + ("of time." if hours >= 0 else "of time were lost (including this package's own work).")
    )


def _before_and_after(run: RecordedRun) -> list[str]:
    """Sentences on what freezing changed; none where nothing is frozen, or where the time before the first freeze is unknown."""
    after = [s for s in run.statuses if s.frozen]
    if not after:
        return []
    last, lines = after[-1], []
    memory, sent = _before(run, after)
    if memory:
        lines.append(f"Optimizer memory over all ranks: {_change(memory, last.optimizer_bytes, size)}")
    if sent and last.gradient_bytes is not None:
        lines.append(f"{'gradients' if lines else 'Gradients'} sent per step: {_change(sent, last.gradient_bytes, size)}")
    lines = ["; ".join(lines) + "."] if lines else []
    # The first status with frozen layers timed the steps before that freeze too.
    slow = [s.step_seconds for s in run.statuses if s.step < after[0].step and not s.frozen and s.step_seconds is not None][-5:]
    slow = slow or [s.usual_seconds for s in after[-1:] if s.usual_seconds is not None]
    fast = [s.step_seconds for s in after[1:][-5:] if s.step_seconds is not None]
    if slow and fast:
        lines.append(f"A step took {_change(median(slow), median(fast), duration)} (medians, before the first freeze and last).")
    return lines


def _before(run: RecordedRun, after: Sequence[Status]) -> tuple[int | None, int | None]:
    """Bytes of optimizer state and gradients before the first freeze: from a status or the start line, else from what was released."""
    found: list[Status | RunStart] = [s for s in run.statuses if not s.frozen and s.step < after[-1].step]
    found = found[-1:] or [s for s in run.starts if not s.frozen and s.optimizer_bytes]
    if found:
        return found[-1].optimizer_bytes, found[-1].gradient_bytes
    first = after[0]
    released = [e.bytes_released_total for e in run.changes() if e.step <= first.step and (not run.starts or e.step >= run.starts[0].step)]
    known = bool(released) and (not run.starts or not run.starts[0].frozen)
    return (first.optimizer_bytes + sum(released) if known else None), None


def _change(before: float, after: float, show: Callable[[float], str]) -> str:
    share = f" ({100 * (after / before - 1):+.0f} %)".replace("-", "−") if before else ""
    return f"{show(before)} → {show(after)}{share}"


def _layers(count: int, total: int) -> str:
    return f"{count} of {total} layers"


def _hours(hours: float) -> str:
    hours = abs(hours)
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


# --- parts of the page -----------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return html.escape(text)


def _facts(run: RecordedRun, log: Path) -> str:
    facts = {"log": log.name}
    if run.starts:
        last = run.starts[-1]
        facts |= {"policy": last.policy + (", dry run" if last.dry_run else ""), "engine": last.engine, "ranks": str(last.ranks)}
        facts |= {"layers": str(len(last.layers)), "weights": f"{sum(last.weights):,}", "smartfrz_ds": last.version}
        facts["started"] = _when(run.starts[0].time)
        facts |= {"resumed": some(run.resumes, "time")} if run.resumes else {}
    if run.statuses:
        facts["last status"] = f"step {run.statuses[-1].step:,}, {_when(run.statuses[-1].time)}"
    return "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in facts.items())


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _warnings(run: RecordedRun) -> str:
    lines = [f"<li>The log: {_text(note)}.</li>" for note in run.notes]
    lines += [f"<li>Step {e.step:,}: {_text(e.message)}</li>" for e in run.events if e.kind == "warning"]
    return f'<section class="warnings"><h2>Warnings</h2><ul>{"".join(lines)}</ul></section>' if lines else ""


def _table(run: RecordedRun) -> str:
    shown = [e for e in run.events if e.kind != "warning" and (e.kind != "decision" or e.layers)]
    silent = sum(e.kind == "decision" and not e.layers for e in run.events)
    rows = "".join(_row(e, run.layers) for e in shown[:MOST_ROWS])
    if not rows:
        rows = '<tr><td colspan="6">none yet</td></tr>'
    about = f"<p>{some(silent, 'more decision')} of the policy did not freeze anything.</p>" if silent else ""
    if len(shown) > MOST_ROWS:
        about += f"<p>{len(shown) - MOST_ROWS} more events are only in the log.</p>"
    heads = "".join(f"<th>{name}</th>" for name in ("step", "what", "layers", "released", "pause", "reason"))
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{about}'


def _row(event: FreezeEvent, order: Sequence[str]) -> str:
    # Layers with one reason share a line.
    reasons: dict[str, list[str]] = {}
    for name in event.layers:
        if event.reasons.get(name):
            reasons.setdefault(event.reasons[name], []).append(name)
    several = len(event.layers) > 1 and len(reasons) > 1
    why = [f"<b>{_text(layer_names(names, order))}</b>: {_text(r)}" if several else _text(r) for r, names in reasons.items()]
    if not why:
        why = [_text(event.message) or "manual, or no reason given"]
    what = {"decision": "would freeze" if event.dry_run else "left out", "rebalance": "stages moved", "cache": "prefix cache"}.get(
        event.kind, event.kind
    )
    if event.bounds:
        why = [f"stages begin at {', '.join(map(str, event.bounds[:-1]))}; predicted {event.gain:.2f} × faster"]
    if event.kind == "load":
        what, why = f"loaded at {event.from_step:,}", [_text(_loaded(event, order))]
    changed = event.kind in ("freeze", "thaw")
    cells = [
        (f"{event.step:,}", "number"),
        (f'<span class="tag {event.kind}">{what}</span>', ""),
        (_text(layer_names(event.layers, order)), ""),
        (size(event.bytes_released_total) if changed else "", "number"),
        (duration(event.seconds) if changed else "", "number"),
        ("<br>".join(why), "reason"),
    ]
    return "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in cells) + "</tr>"
