"""`smartfrz bench peak`: what a freeze of half of a model holds above the level before, measured and by the formula.

Each number of ranks is one launch (peak_worker.py) that trains one engine after the other and freezes its front half. On a CPU run the
host is the device, so everything counts: a new state tensor beside the old one too, which on an accelerator is made in freed memory. That
case is computed (paper.py) by the same planning code, on shapes without storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from smartfrz_ds.bench.launching import Settings, run_cases

from . import paper

HOST = {"DS_ACCELERATOR": "cpu"}  # the trace of peak_worker.py is of torch's CPU allocator
_BF16: Settings = {"bf16": {"enabled": True}}


def _engine(stage: int, extra: Settings | None = None) -> Settings:
    return {"zero_optimization": {"stage": stage}} | (extra or {})


ENGINES: dict[str, Settings] = {
    "z0-fp32": _engine(0),
    "z0-bf16": _engine(0, _BF16),
    "z1-fp32": _engine(1),
    "z1-bf16": _engine(1, _BF16),
    "z1-bf16opt": _engine(1, _BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "z2-fp32": _engine(2),
    "z2-bf16": _engine(2, _BF16),
    "z3-fp32": _engine(3),
    "z3-bf16": _engine(3, _BF16),
}


def bench_peak(
    out: Path, *, ranks: Sequence[int] = (2, 4), engines: Iterable[str] = tuple(ENGINES), params: float = 4.0, staging: int = 256
) -> str:
    """Measure the peak of a freeze and make the tables, which are also written to `out`/peak.md.

    Args:
        out: Folder with one JSON file per number of ranks. What was already measured with the same settings is not measured again.
        ranks: Numbers of ranks, each >= 2.
        engines: Keys of `ENGINES`.
        params: Size of the network in millions of weights, >= 0.01.
        staging: Size of a staging buffer in KiB, >= 1. The package's own, 32 MiB, would hold all of a small network.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: An unknown engine, or a number out of range.
        RuntimeError: A run failed; the message has the end of its output. Earlier results are kept.
    """
    chosen = list(engines)
    unknown = [name for name in chosen if name not in ENGINES]
    if unknown or not chosen:
        raise ValueError(f"engines: got {unknown}; allowed: {', '.join(ENGINES)}")
    if not ranks or min(ranks) < 2:
        raise ValueError(f"--ranks: got {list(ranks)}; allowed: numbers of at least 2")
    for name, value, least in (("params", params, 0.01), ("staging", staging, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}; allowed: at least {least}")
    settings = {"engines": chosen, "params": params, "staging": staging * 1024}
    cases = [f"{world}-ranks" for world in ranks]
    results = run_cases(
        "smartfrz_ds.bench.peak.worker", cases, out, settings, lambda case: int(case.split("-")[0]), unit="run", environment=HOST
    )
    text = f"{measured_table(results)}\n{paper.WORDS}\n\n{paper.table()}"
    (out / "peak.md").write_text(text)
    return text


def measured_table(results: Iterable[Settings]) -> str:
    """Make the table of these results, as Markdown."""
    lines = [
        "Live bytes of torch's allocator above the level before a freeze of the front half, MB, on the rank with the most. Weights: in the",
        "model's dtype, as held by a rank before. One state tensor: the largest of master and moments. Formula: what is compared with the",
        "free memory before a freeze. After: the level at the end of the freeze.",
        "",
        "| ranks | engine | weights | one state tensor | peak, measured (÷ weights) | formula | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for name, e in r["engines"].items():
            share = f"{e['peak'] / e['weights']:.2f}"
            cells: list[Any] = [r["ranks"], name, _mb(e["weights"]), _mb(e["tensor"]), f"**{_mb(e['peak'])}** ({share})"]
            lines.append(f"| {' | '.join(str(c) for c in [*cells, _mb(e['formula']), _mb(e['after'])])} |")
    return "\n".join(lines) + "\n"


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}"
