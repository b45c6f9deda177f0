"""`smartfrz bench pipeline`: what a frozen front saves in a pipeline, with the stages as they are and after layers have moved.

Each case is one launch (pipeline_worker.py), which trains four copies of a net side by side and alternates their steps: nothing frozen,
cut as DeepSpeed cuts it; nothing frozen, with the best cut for that; the front frozen; the front frozen and layers moved. So a busy machine
hits all alike; ratios are to be trusted, milliseconds are not. Layers that sleep instead of computing are the fair ones where ranks
outnumber cores. The prediction is the planner's, with the layers' costs as the unfrozen copy has measured them in the same steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from .launching import Settings, run_cases

KINDS = ("unfrozen", "balanced", "pruned", "rebalanced")
FRACTIONS = (0.25, 0.5, 0.75)


class Case(NamedTuple):
    """net: what the layers are; stages: of the pipeline, one rank each."""

    net: Literal["sleep", "gpt"]
    stages: int


CASES = {"sleep-pp2": Case("sleep", 2), "sleep-pp4": Case("sleep", 4), "gpt-pp2": Case("gpt", 2)}


def bench_pipeline(
    cases: Iterable[str],
    out: Path,
    *,
    rounds: int = 7,
    nap: float = 0.01,
    micro_batches: int = 8,
    blocks: int = 16,
    width: int = 256,
    length: int = 128,
    rows: int = 2,
) -> str:
    """Measure these cases and return tables (Markdown), which also go to `out`/pipeline.md.

    cases: keys of `CASES`. out: a folder for one JSON a case; one that is there with the same settings is not measured again.
    rounds: timed steps of each copy, >= 1. nap: seconds that a sleeping layer takes for its forward, and for each of its two gradients,
        > 0. micro_batches: of a step, >= 1.
    blocks, width, length, rows: of the GPT: blocks (>= 4, a multiple of 4), their width (a multiple of 4), tokens of a text, texts of a
        micro-batch.

    Raises:
        ValueError: an unknown case, a number out of range.
        RuntimeError: a case's run failed; the message carries the end of its output. What was measured stays.
    """
    chosen = list(cases)
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        raise ValueError(f"--case: got {unknown[0]!r}; allowed: {', '.join(CASES)}")
    settings = {
        "rounds": rounds,
        "nap": nap,
        "micro_batches": micro_batches,
        "blocks": blocks,
        "width": width,
        "length": length,
        "rows": rows,
    }
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value}; allowed: more than 0")
    for name in ("blocks", "width"):
        if settings[name] % 4:
            raise ValueError(f"{name}: got {settings[name]}; allowed: a multiple of 4")
    results = run_cases("smartfrz_ds.bench.pipeline_worker", chosen, out, settings, lambda name: CASES[name].stages, unit="case")
    text = tables(results)
    (out / "pipeline.md").write_text(text)
    return text


# --- what the numbers say --------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """How many times faster a step is than the unfrozen one. measured: the median over the rounds, in each of which the copies take turns,
    so that what disturbs one disturbs the next; fastest: fastest step over fastest step; predicted: by the planner."""

    measured: float
    fastest: float
    predicted: float

    @property
    def reached(self) -> float:
        """Share of the predicted speed-up that was reached."""
        return self.measured / self.predicted


def ratio(part: Settings, kind: str, base: str = "unfrozen") -> Ratio:
    """part: one entry of a result's "fractions"."""
    seconds, predicted = part["seconds"], part["predicted"]
    return Ratio(
        median(a / b for a, b in zip(seconds[base], seconds[kind], strict=True)),
        min(seconds[base]) / min(seconds[kind]),
        predicted[base] / predicted[kind],
    )


def tables(results: Sequence[Settings]) -> str:
    """The tables of these results, as Markdown."""
    lines = [
        "How many times faster a step is than with nothing frozen in the cut that DeepSpeed makes (uniform): measured (median over the",
        "rounds; in brackets fastest over fastest step) / predicted. Reached: measured ÷ predicted. Best cut: nothing frozen, but with the",
        "best cut for that; what is gained beyond it is due to freezing.",
        "",
        "| case | frozen | best cut, nothing frozen | pruned | pruned + re-balanced | reached | layers of the stages |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for part in r["fractions"]:
            cells = [_cell(ratio(part, kind)) for kind in ("balanced", "pruned", "rebalanced")]
            reached = ratio(part, "rebalanced").reached
            lines.append(
                f"| {r['case']} | {part['fraction']:.0%} of {r['layers']} | {' | '.join(cells)} | **{reached:.2f}** "
                f"| {_sizes(r['start'])} -> {_sizes(part['rebalance']['bounds'])} |"
            )
    lines += [
        "",
        "Bytes, by rank. Between stages: what a rank sends in a step, activations (to the next stage) and gradients (to the one before).",
        "Moved: what crossed ranks when layers moved for this share, and how long that stood still.",
        "",
        "| case | frozen | MB of activations | MB of gradients | optimizer, MB | moved |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(f"| {r['case']} | nothing | {_bytes(r['holds']['unfrozen'])} | |")
        for part in r["fractions"]:
            for kind, name in (("pruned", ""), ("rebalanced", ", re-balanced")):
                moves = part["rebalance"]["moves"] if kind == "rebalanced" else []
                moved = ", ".join(f"{m['bytes'] / 1e6:.3g} MB in {m['seconds']:.2f} s" for m in moves)
                lines.append(f"| {r['case']} | {part['fraction']:.0%}{name} | {_bytes(part['holds'][kind])} | {moved} |")
    lines += ["", "Step times behind the first table: the fastest, in ms (measured / simulated), of each case's copies.", ""]
    lines += ["| case | frozen | " + " | ".join(KINDS) + " |", "|---|---|" + "---|" * len(KINDS)]
    for r in results:
        for part in r["fractions"]:
            cells = [f"{1000 * min(part['seconds'][kind]):.0f} / {1000 * part['predicted'][kind]:.0f}" for kind in KINDS]
            lines.append(f"| {r['case']} | {part['fraction']:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(ratio: Ratio) -> str:
    return f"{ratio.measured:.2f}x ({ratio.fastest:.2f}) / {ratio.predicted:.2f}x"


def _sizes(bounds: Sequence[int]) -> str:
    return "+".join(str(b - a) for a, b in pairwise(bounds))


def _bytes(holds: Settings) -> str:
    return " | ".join(" + ".join(f"{n / 1e6:.3g}" for n in holds[key]) for key in ("activations", "gradients", "optimizer"))
