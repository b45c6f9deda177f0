"""`smartfrz bench zero`: what freezing half of a model saves on each ZeRO engine, compared with the ideal and with naive freezing.

Each engine is one launch of a few ranks (zero_worker.py) that trains four copies of a network side by side and alternates their steps:
nothing frozen; half frozen during training with requires_grad_(False) ("naive"); half frozen by this package ("ours"); half frozen before
DeepSpeed created its engine ("fresh"). A busy machine thus affects all copies alike: ratios are reliable, milliseconds are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from .launching import Settings, run_cases
from .memory import MMAP_THRESHOLD

KINDS = ("unfrozen", "naive", "ours", "fresh")
_COUNTED = ("unfrozen", "naive", "ours")

_BF16: Settings = {"bf16": {"enabled": True}}
# As for a model larger than the limits: every layer is released after its use and gathered again for backward.
_TIGHT: Settings = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def _engine(stage: int, *extra: Settings, frozen: str | None = None, **zero: Any) -> Settings:
    """Make a DeepSpeed config, and the package's settings under "smartfrz"."""
    merged: Settings = {"zero_optimization": {"stage": stage, **zero}, "smartfrz": {"policy": "manual"}}
    for part in extra:
        merged |= part
    if frozen:
        merged["smartfrz"] |= {"zero3": {"frozen": frozen}}
    return merged


ENGINES: dict[str, Settings] = {
    "z0-fp32": _engine(0),
    "z1-fp32": _engine(1),
    "z1-bf16opt": _engine(1, _BF16, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "z2-fp32": _engine(2),
    "z2-bf16": _engine(2, _BF16),
    "z3-fp32": _engine(3),
    "z3-bf16": _engine(3, _BF16),
    "z3-fp32-replicated": _engine(3, frozen="replicated"),
    "z3-fp32-auto": _engine(3, frozen="auto"),
    "z3-fp32-tight": _engine(3, **_TIGHT),
    "z3-fp32-tight-replicated": _engine(3, frozen="replicated", **_TIGHT),
    "z3-fp32-tight-auto": _engine(3, frozen="auto", **_TIGHT),
}


def engines_of(stages: Collection[int]) -> list[str]:
    """Names of the engines of these ZeRO stages.

    Raises:
        ValueError: A number is not a ZeRO stage.
    """
    wrong = [s for s in stages if s not in (0, 1, 2, 3)]
    if wrong or not stages:
        raise ValueError(f"--stages: got {list(stages)}; allowed: 0, 1, 2, 3")
    return [name for name, config in ENGINES.items() if config["zero_optimization"]["stage"] in stages]


def bench_zero(
    engines: Iterable[str], out: Path, *, params: float = 38.0, rounds: int = 5, steps: int = 3, batch: int = 32, ranks: int = 2
) -> str:
    """Measure engines and make tables, which are also written to `out`/zero.md.

    Args:
        engines: Keys of `ENGINES`.
        out: Folder with one JSON file per engine. An engine that was already measured with the same settings is not measured again.
        params: Size of the network in millions of weights, >= 0.01.
        rounds: Number of rounds, >= 1; results are medians over them.
        steps: Timed steps per round and copy, >= 1.
        batch: Rows per rank, >= 1.
        ranks: Number of ranks, >= 2.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: An unknown engine, or a number out of range.
        RuntimeError: An engine's run failed; the message has the end of its output. Earlier results are kept.
    """
    chosen = list(engines)
    unknown = [name for name in chosen if name not in ENGINES]
    if unknown:
        raise ValueError(f"engines: got {unknown}; allowed: {', '.join(ENGINES)}")
    for name, value, least in (
        ("rounds", rounds, 1),
        ("steps", steps, 1),
        ("batch", batch, 1),
        ("ranks", ranks, 2),
        ("params", params, 0.01),
    ):
        if value < least:
            raise ValueError(f"{name}: got {value}; allowed: at least {least}")
    settings = {"params": params, "rounds": rounds, "steps": steps, "batch": batch, "ranks": ranks}
    memory = {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
    worker = "smartfrz_ds.bench.zero_worker"
    results = run_cases(worker, chosen, out, settings, lambda _: ranks, unit="engine", environment=memory)
    text = tables(results)
    (out / "zero.md").write_text(text)
    return text


# --- tables --------------------------------------------------------------------------------------------------------------------------


def ideal_seconds(unfrozen: list[float], share: float) -> float:
    """Seconds of a step if the frozen share of backward and optimizer step, their communication included, cost nothing.

    Args:
        unfrozen: Measured seconds of forward, backward and step.
        share: Frozen share of the weights, in [0, 1].
    """
    forward, backward, step = unfrozen
    return forward + (1 - share) * (backward + step)


def summary(result: Settings) -> dict[str, float]:
    """Summarize one engine's result: medians over the rounds, as ratios to the unfrozen step of the same round.

    Returns:
        Among others `step_ms`, the unfrozen step itself; `fresh`, our step over that of an engine created with the same half frozen;
        `achieved_quiet` and `fresh_quiet`, computed from the fastest time of each phase over all rounds, as on an idle machine.
    """
    share, rounds = result["share"], result["rounds"]

    def middle(value: Callable[[Settings], float]) -> float:
        return median(value(r) for r in rounds)

    def fastest(kind: str) -> list[float]:
        return [min(r[kind][k] for r in rounds) for k in range(3)]

    has_fresh = "fresh" in rounds[0]
    return {
        "step_ms": 1000 * middle(lambda r: sum(r["unfrozen"])),
        "naive": middle(lambda r: sum(r["naive"]) / sum(r["unfrozen"])),
        "ours": middle(lambda r: sum(r["ours"]) / sum(r["unfrozen"])),
        "fresh": middle(lambda r: sum(r["ours"]) / sum(r["fresh"])) if has_fresh else math.nan,
        "ideal": middle(lambda r: ideal_seconds(r["unfrozen"], share) / sum(r["unfrozen"])),
        "achieved": middle(lambda r: ideal_seconds(r["unfrozen"], share) / sum(r["ours"])),
        "achieved_quiet": ideal_seconds(fastest("unfrozen"), share) / sum(fastest("ours")),
        "fresh_quiet": sum(fastest("ours")) / sum(fastest("fresh")) if has_fresh else math.nan,
        "freeze_ms": 1000 * middle(lambda r: r["freeze"]),
        "freeze_steps": middle(lambda r: r["freeze"] / sum(r["unfrozen"])),
    }


def tables(results: list[Settings]) -> str:
    """Make the tables of these results, as Markdown."""
    lines = [
        "Step time (phases: forward, backward, step). Ratios are to the unfrozen step of the same round, medians over the rounds.",
        "Ideal: forward + the active share of backward and step, as measured unfrozen. Achieved ÷ ideal: ideal time over ours (1: all",
        "possible savings).",
        "Ours ÷ fresh: our step over that of an engine that DeepSpeed created with the same half frozen (1: no overhead of ours).",
        "Quiet: from the fastest time of each phase over all rounds, which a busy machine disturbs least.",
        "",
        "| engine | unfrozen, ms (phases) | naive | ours | ideal | achieved ÷ ideal (rounds), quiet | ours ÷ fresh, quiet |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        s = summary(r)
        phases = " / ".join(f"{1000 * median(x['unfrozen'][k] for x in r['rounds']):.0f}" for k in range(3))
        each = sorted(ideal_seconds(x["unfrozen"], r["share"]) / sum(x["ours"]) for x in r["rounds"])
        lines.append(
            f"| {r['engine']} | {s['step_ms']:.0f} ({phases}) | {s['naive']:.2f} | {s['ours']:.2f} | {s['ideal']:.2f} "
            f"| **{s['achieved']:.2f}** ({each[0]:.2f}-{each[-1]:.2f}), **{s['achieved_quiet']:.2f}** "
            f"| {s['fresh']:.2f}, {s['fresh_quiet']:.2f} |"
        )
    lines += [
        "",
        "Bytes. Per step: passed to collectives by one rank (all-gather: received). Optimizer: live bytes on a rank, master weights",
        "included. Peak: rise of resident memory during the freeze, and the allowed rise. Predicted: before the freeze.",
        "",
        "| engine | MB per step: before, naive, ours | optimizer MB: before, naive, ours (released ÷ frozen share) | peak, MB (allowed) "
        "| freeze, ms (in steps; predicted ms) | MB moved (predicted) |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        s, freeze, state = summary(r), r["freeze"], r["optimizer_bytes"]
        wire = ", ".join(f"{_total(r['bytes'][k]) / 1e6:.1f}" for k in _COUNTED)
        released = (state["unfrozen"] - state["ours"]) / state["unfrozen"] / r["share"]
        lines.append(
            f"| {r['engine']} | {wire} | {', '.join(f'{state[k] / 1e6:.1f}' for k in _COUNTED)} ({released:.3f}) "
            f"| {freeze['rise'] / 1e6:.1f} ({freeze['allowed'] / 1e6:.1f}) "
            f"| {s['freeze_ms']:.0f} ({s['freeze_steps']:.2f}; {1000 * freeze['predicted_seconds']:.0f}) "
            f"| {freeze['moved_bytes'] / 1e6:.1f} ({freeze['predicted_bytes'] / 1e6:.1f}) |"
        )
    third = [r for r in results if r["engine"].startswith("z3")]
    if third:
        lines += [
            "",
            "ZeRO-3 by phase, MB per step before -> after the freeze, and resident memory that the freeze released on a rank.",
            "",
            "| engine | gathered, forward | gathered, backward | reduced, backward | gathered, step | resident MB released |",
            "|---|---|---|---|---|---|",
        ]
        for r in third:
            cells = [
                _arrow(r, "forward", "gather"),
                _arrow(r, "backward", "gather"),
                _arrow(r, "backward", "reduce"),
                _arrow(r, "step", "gather"),
            ]
            lines.append(f"| {r['engine']} | {' | '.join(cells)} | {r['freeze']['fall'] / 1e6:.1f} |")
        lines += ["", "A snapshot of all layers, compared with gathering the parameters in the same run.", ""]
        lines += ["| engine | snapshot: bytes, ms | gather: bytes, ms | snapshot ÷ gather: bytes, time |", "|---|---|---|---|"]
        for r in third:
            a, b = r["snapshot"], r["gather"]
            lines.append(
                f"| {r['engine']} | {a['bytes']}, {1000 * a['seconds']:.2f} | {b['bytes']}, {1000 * b['seconds']:.1f} "
                f"| {a['bytes'] / b['bytes']:.2%}, {a['seconds'] / b['seconds']:.2%} |"
            )
    return "\n".join(lines) + "\n"


def _total(phases: dict[str, dict[str, int]]) -> int:
    return sum(count for phase in phases.values() for count in phase.values())


def _arrow(result: Settings, phase: str, kind: str) -> str:
    before, after = (sum(n for name, n in result["bytes"][k][phase].items() if kind in name) for k in ("unfrozen", "ours"))
    return f"{before / 1e6:.1f} -> {after / 1e6:.1f}"
