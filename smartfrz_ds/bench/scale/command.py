"""`smartfrz bench scale`: the Python of a freezing run on a cluster that is not there.

One process plays rank 0 of 8 to 1024 (measure.py). Each cell is a line of `OUT/cells.jsonl`; what is there is not measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .measure import ENGINES, STAGES, measure
from .shapes import DEPTHS, MODELS, SHAPES

RANKS = (8, 64, 256, 1024)
PARTS = ("snapshot", "stage", "plan", "checkpoint")
FORMAT = 1

WORDS = (
    "CPU time of this package's Python on rank 0, ms, the fastest of some calls, and behind it the number of collectives. Snapshot.\n"
    "Stage: a freezing stage with the policy `attention` (in brackets the predictor's own forward). Freeze: planning a freeze of the\n"
    "front half, all checks included. Checkpoint: planning one after it, with the released state kept (`keep_state`). Moved: bytes\n"
    "between ranks for that freeze, over all ranks (those of the busiest rank). Peak: bytes above the level before, busiest rank."
)
GROWTH_WORDS = (
    "Growth: the exponent b of a fit of cost = a * x^b over the ranks or the layers, by CPU time (by executed Python bytecodes,\n"
    "which have no noise). 1 is linear."
)


def bench_scale(
    out: Path,
    *,
    models: Iterable[str] = MODELS,
    ranks: Sequence[int] = RANKS,
    engines: Iterable[str] = ENGINES,
    repeats: int = 5,
) -> str:
    """Measure the cells that are missing, and make the tables, which are also written to `out`/scale.md.

    Args:
        out: Folder of the results.
        models: Keys of `SHAPES`.
        ranks: Numbers of ranks, each >= 2; for a pipeline, multiples of its 8 stages.
        engines: Some of `ENGINES`.
        repeats: How often each part is timed, >= 1.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: An unknown model or engine, or a number out of range.
        RuntimeError: This process has a process group already.
    """
    models, engines = list(models), list(engines)
    for name, given, known in (("--model", models, SHAPES), ("--engine", engines, ENGINES)):
        if not given or (unknown := [x for x in given if x not in known]):
            raise ValueError(f"{name}: got {unknown if given else given}; allowed: {', '.join(known)}")
    least = STAGES if "pipeline" in engines else 2
    if not ranks or min(ranks) < least or ("pipeline" in engines and any(world % STAGES for world in ranks)):
        allowed = f"multiples of {STAGES}, the stages of the pipeline" if "pipeline" in engines else "numbers of at least 2"
        raise ValueError(f"--ranks: got {list(ranks)}; allowed: {allowed}")
    if repeats < 1:
        raise ValueError(f"--repeats: got {repeats}; allowed: at least 1")
    cells = [(model, world, engine) for model in models for world in ranks for engine in engines]
    if set(MODELS) <= set(models):  # the growth over layers
        cells += [(model, max(ranks), engine) for model in DEPTHS if model not in models for engine in engines]
    rows = measure_cells(out, cells, repeats)
    text = f"{WORDS}\n\n{table(rows)}\n{GROWTH_WORDS}\n\n{growth_table(rows)}"
    (out / "scale.md").write_text(text)
    return text


def measure_cells(out: Path, cells: Sequence[tuple[str, int, str]], repeats: int) -> list[dict[str, Any]]:
    """Measure the cells that `out`/cells.jsonl lacks, each appended as one line, and return all of them in order."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "cells.jsonl"
    known = {_key(row): row for row in _read(file) if row["repeats"] == repeats and row["format"] == FORMAT}
    for cell in tqdm(cells, desc="cells", unit="cell"):
        if cell not in known:
            model, world, engine = cell
            about = {"format": FORMAT, "model": model, "ranks": world, "engine": engine, "repeats": repeats}
            known[cell] = about | measure(SHAPES[model], world, engine, repeats)
            with file.open("a") as lines:
                lines.write(json.dumps(known[cell]) + "\n")
    return [known[cell] for cell in cells]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Make the table of these rows, as Markdown."""
    lines = [
        "| model | engine | ranks | snapshot | stage (predictor) | freeze | checkpoint | moved, GB (busiest) | peak, GB: device | host |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        timed = {part: f"{_ms(r[f'{part}_s'])} · {r[f'{part}_collectives']}" for part in PARTS}
        stage = f"{_ms(r['stage_s'])} ({_ms(r['predictor_s'])}) · {r['stage_collectives']}"
        moved = f"{r['moved_bytes'] / 1e9:.1f} ({r['busiest_bytes'] / 1e9:.2f})"
        cells = [r["model"], r["engine"], r["ranks"], timed["snapshot"], stage, timed["plan"], timed["checkpoint"], moved]
        cells += [f"{r['device_bytes'] / 1e9:.2f}", f"{r['host_bytes'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def growth_table(rows: Sequence[dict[str, Any]]) -> str:
    """Make the table of exponents, as Markdown: over the ranks for the model of the most weights, over the layers on the most ranks."""
    lines = ["| engine | over | snapshot | stage | freeze | checkpoint |", "|---|---|---|---|---|---|"]
    most = max(r["ranks"] for r in rows)
    largest = max(rows, key=lambda r: (r["model"] not in set(DEPTHS) - set(MODELS), r["layers"]))["model"]
    for engine in dict.fromkeys(r["engine"] for r in rows):
        series = {
            f"ranks, {largest}": ("ranks", [r for r in rows if r["engine"] == engine and r["model"] == largest]),
            f"layers, {most} ranks": ("layers", [r for r in rows if r["engine"] == engine and r["model"] in DEPTHS and r["ranks"] == most]),
        }
        for name, (axis, some) in series.items():
            if len({r[axis] for r in some}) > 1:
                both = [[exponent(some, axis, f"{part}_{kind}") for kind in ("s", "work")] for part in PARTS]
                lines.append(f"| {engine} | {name} | {' | '.join(f'{time:.2f} ({work:.2f})' for time, work in both)} |")
    return "\n".join(lines) + "\n"


def exponent(rows: Iterable[dict[str, Any]], axis: str, value: str) -> float:
    """Return b of the least-squares fit of `value` = a * `axis`^b, both > 0, at two different values of `axis` or more."""
    points = [(math.log(r[axis]), math.log(r[value])) for r in rows]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["model"], row["ranks"], row["engine"]


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; a line that was cut off by the end of a process is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"model", "ranks", "engine", "repeats", "format"} <= row.keys():
            rows.append(row)
    return rows


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
