"""`smartfrz bench overhead`: the plugin's seconds and calls in a run in which nothing freezes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from smartfrz_ds.bench.launching import Settings, run_cases

TIMED = ("torch", "z2")  # in one process
COUNTED = ("z2", "z3", "fsdp2", "pipeline")  # on two ranks
COUNTS = ("plain step", "status line", "snapshot", "freezing stage", "freeze", "first step after a freeze", "plain step, half frozen")
_NAMES = {"torch": "attach_torch", "z2": "ZeRO-2", "z3": "ZeRO-3", "fsdp2": "FSDP2", "pipeline": "pipeline, 2 stages"}
_SECONDS = COUNTS[:4]


def bench_overhead(out: Path, *, params: Sequence[int] = (700, 4800), steps: int = 120, few: int = 100) -> str:
    """Measure and make the tables, which are also written to `out`/overhead.md.

    Args:
        out: Folder with one JSON file per case. What was already measured with the same settings is not measured again.
        params: Numbers of parameters of the nets that are timed, each >= 18.
        steps: Steps of each timed run, >= 40.
        few: Number of parameters of the nets whose calls are counted on two ranks, >= 34.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: A number out of range.
        RuntimeError: A run failed; the message has the end of its output. Earlier results are kept.
    """
    for name, value, least in (("--params", min(params, default=0), 18), ("--steps", steps, 40), ("--few", few, 34)):
        if value < least:
            raise ValueError(f"{name}: got {value}; allowed: at least {least}")
    cases = [f"{engine}-{count}" for count in params for engine in TIMED] + [f"{engine}-counts" for engine in COUNTED]
    settings = {"steps": steps, "few": few}
    results = run_cases(
        "smartfrz_ds.bench.overhead.worker", cases, out, settings, lambda case: 2 if case.endswith("-counts") else 1, unit="run"
    )
    timed = [r for r in results if "seconds" in r]
    text = f"{seconds_table(timed)}\n{counts_table([r for r in results if 'seconds' not in r])}"
    (out / "overhead.md").write_text(text)
    return text


def seconds_table(results: Iterable[Settings]) -> str:
    """Make the table of the meter's readings, as Markdown."""
    lines = [
        "Milliseconds of this package in a step with nothing frozen, by `report().plugin_seconds`, in one process: median and, in",
        "brackets, the smallest. Then the calls of its Python functions in a plain step.",
        "",
        f"| engine | parameters | {' | '.join(_SECONDS)} | calls in a plain step |",
        f"|---|---|{'---|' * (len(_SECONDS) + 1)}",
    ]
    for r in results:
        cells = [_NAMES[r["engine"]], f"{r['params']:,}"]
        for kind in _SECONDS:
            seen = r["seconds"].get(kind)
            cells.append(f"**{1e3 * median(seen):.3f}** ({1e3 * min(seen):.3f})" if seen else "-")
        lines.append(f"| {' | '.join([*cells, str(r['counts']['plain step']['calls'])])} |")
    return "\n".join(lines) + "\n"


def counts_table(results: Iterable[Settings]) -> str:
    """Make the table of the counts, as Markdown."""
    lines = [
        "On two ranks: calls of this package's Python functions / values that it reads from tensors (each a sync on a GPU) / collectives",
        "that it calls itself, on rank 0.",
        "",
        f"| engine | parameters | {' | '.join(COUNTS)} |",
        f"|---|---|{'---|' * len(COUNTS)}",
    ]
    for r in results:
        cells = [f"{n['calls']} / {n['reads']} / {n['collectives']}" for n in (r["counts"][kind] for kind in COUNTS)]
        lines.append(f"| {' | '.join([_NAMES[r['engine']], str(r['params']), *cells])} |")
    return "\n".join(lines) + "\n"
