"""`smartfrz bench zero`: what freezing half of a model saves on each ZeRO engine, beside what it could save and beside naive freezing.

Each engine is one launch of two ranks (zero_worker.py), which trains four copies of a net side by side and alternates their steps: one
with nothing frozen, one frozen in mid-training with requires_grad_(False), one by this package, and one whose half was frozen before
DeepSpeed built its engine ("fresh": what DeepSpeed itself makes of a half-frozen model). So a busy machine hits all alike; ratios are to
be trusted, milliseconds are not.
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
# What a model larger than the limits sees: every layer is let go after its use and gathered again for backward.
_TIGHT: Settings = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def _engine(stage: int, *extra: Settings, frozen: str | None = None, **zero: Any) -> Settings:
    """A DeepSpeed config, and the package's settings under "smartfrz"."""
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
    """The names of the engines of these ZeRO stages.

    Raises:
        ValueError: a stage that is none.
    """
    wrong = [s for s in stages if s not in (0, 1, 2, 3)]
    if wrong or not stages:
        raise ValueError(f"--stages: got {list(stages)}; allowed: some of 0, 1, 2, 3")
    return [name for name, config in ENGINES.items() if config["zero_optimization"]["stage"] in stages]


def bench_zero(
    engines: Iterable[str], out: Path, *, params: float = 38.0, rounds: int = 5, steps: int = 3, batch: int = 32, ranks: int = 2
) -> str:
    """Measure these engines and return tables (Markdown), which also go to `out`/zero.md.

    engines: keys of `ENGINES`. out: a folder for one JSON an engine; one that is there with the same settings is not measured again.
    params: size of the net, in millions, > 0. rounds: >= 1, medians are over them. steps: timed steps a round and copy, >= 1.
    batch: rows a rank, >= 1. ranks: >= 2.

    Raises:
        ValueError: an unknown engine, a number out of range.
        RuntimeError: an engine's run failed; the message carries the end of its output. What was measured stays.
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


# --- what the numbers say --------------------------------------------------------------------------------------------------------


def ideal_seconds(unfrozen: list[float], share: float) -> float:
    """A step in which the frozen share of backward and optimizer step, their communication included, costs nothing.

    unfrozen: measured seconds of forward, backward, step. share: frozen share of the weights, in [0, 1].
    """
    forward, backward, step = unfrozen
    return forward + (1 - share) * (backward + step)


def summary(result: Settings) -> dict[str, float]:
    """Medians over the rounds of one engine's JSON, as ratios of the unfrozen step of the same round; `step_ms` of that step itself.

    fresh: our step over that of an engine built with the same half frozen. achieved_quiet, fresh_quiet: as achieved and fresh, each phase
    being the fastest of all rounds: what a quiet machine would show.
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
    """The tables of these results, as Markdown."""
    lines = [
        "Step time (phases: forward, backward, step). Ratios are to the unfrozen step of the same round, medians over the rounds.",
        "Ideal: forward + the active share of backward and step, as measured unfrozen. Achieved ÷ ideal: ideal time over ours (1 = all",
        "that could be saved).",
        "Ours ÷ fresh: our step over that of an engine that DeepSpeed built with the same half frozen (1 = no overhead of ours).",
        "Quiet: from the fastest of each phase in all rounds, which a busy machine disturbs least.",
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
        "Bytes. Per step: what one rank hands to collectives (of an all-gather: what arrives). Optimizer: live bytes on a rank, masters",
        "included. Peak: rise of resident memory during the freeze, and what the contract allows. Predicted: before the freeze (pause.py).",
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
            "ZeRO-3 by phase, MB per step before -> after the freeze, and resident memory that the freeze gave back on a rank.",
            "",
            "| engine | gathered, forward | gathered, backward | reduced, backward | gathered, step | resident MB given back |",
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
        lines += ["", "A snapshot of all layers, beside gathering the parameters, in the same run.", ""]
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
