"""`smartfrz bench pipeline`: the savings of a frozen prefix in a pipeline, with unchanged stages and after rebalancing.

Each case is one launch (pipeline_worker.py) that trains four copies of a network side by side and alternates their steps: nothing frozen
with DeepSpeed's partition; nothing frozen with the best partition; a frozen prefix; a frozen prefix with rebalanced layers. A busy machine
thus affects all copies alike: ratios are reliable, milliseconds are not. Layers that sleep instead of computing give a fair comparison
where there are more ranks than cores. The planner makes the prediction, from the layer costs that the unfrozen copy measures in the same
steps.
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
    """A benchmark case.

    Attributes:
        net: "sleep": layers that sleep for a known time; "gpt": a GPT.
        stages: Number of pipeline stages, one rank each.
    """

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
    """Measure cases and make tables, which are also written to `out`/pipeline.md.

    Args:
        cases: Keys of `CASES`.
        out: Folder with one JSON file per case. A case that was already measured with the same settings is not measured again.
        rounds: Timed steps per copy, >= 1.
        nap: Seconds that a sleeping layer takes for its forward and for each of its two gradients, > 0.
        micro_batches: Micro-batches per step, >= 1.
        blocks: Number of blocks of the GPT, >= 4, a multiple of 4.
        width: Width of the GPT, a multiple of 4.
        length: Tokens per sequence of the GPT.
        rows: Sequences per micro-batch of the GPT.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: An unknown case, or a number out of range.
        RuntimeError: A case's run failed; the message has the end of its output. Earlier results are kept.
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


# --- tables --------------------------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Speed-up of a step over the unfrozen one.

    Attributes:
        measured: Median over the rounds, in each of which the copies take turns, so that a disturbance affects all of them.
        fastest: Fastest unfrozen step over fastest step.
        predicted: The planner's prediction.
    """

    measured: float
    fastest: float
    predicted: float

    @property
    def reached(self) -> float:
        """Measured speed-up over predicted speed-up."""
        return self.measured / self.predicted


def ratio(part: Settings, kind: str, base: str = "unfrozen") -> Ratio:
    """Compute the speed-up of one kind of copy over another.

    Args:
        part: One entry of a result's "fractions".
        kind: One of `KINDS`.
        base: The kind to compare with.
    """
    seconds, predicted = part["seconds"], part["predicted"]
    return Ratio(
        median(a / b for a, b in zip(seconds[base], seconds[kind], strict=True)),
        min(seconds[base]) / min(seconds[kind]),
        predicted[base] / predicted[kind],
    )


def tables(results: Sequence[Settings]) -> str:
    """Make the tables of these results, as Markdown."""
    lines = [
        "Speed-up of a step over the unfrozen one with DeepSpeed's uniform partition: measured (median over the rounds; in parentheses:",
        "fastest over fastest step) / predicted. Reached: measured ÷ predicted. Best cut: nothing frozen, with the best partition; any",
        "further gain is due to freezing.",
        "",
        "| case | frozen | best cut, nothing frozen | pruned | pruned + rebalanced | reached | layers of the stages |",
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
        "Bytes, by rank. Between stages: sent by a rank per step, activations to the next stage and gradients to the previous one.",
        "Moved: bytes sent between ranks when layers moved for this fraction, and the pause.",
        "",
        "| case | frozen | MB of activations | MB of gradients | optimizer, MB | moved |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(f"| {r['case']} | nothing | {_bytes(r['holds']['unfrozen'])} | |")
        for part in r["fractions"]:
            for kind, name in (("pruned", ""), ("rebalanced", ", rebalanced")):
                moves = part["rebalance"]["moves"] if kind == "rebalanced" else []
                moved = ", ".join(f"{m['bytes'] / 1e6:.3g} MB in {m['seconds']:.2f} s" for m in moves)
                lines.append(f"| {r['case']} | {part['fraction']:.0%}{name} | {_bytes(part['holds'][kind])} | {moved} |")
    lines += ["", "Step times for the first table: the fastest of each copy, in ms (measured / simulated).", ""]
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
