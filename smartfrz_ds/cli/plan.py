"""The `smartfrz plan` command: makes a plan from its options, and a table from the plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from smartfrz_ds.planner.cached import CachedPhase, CacheUse
from smartfrz_ds.planner.costs import Cluster, LayerCost, Link, estimate_costs, load_costs
from smartfrz_ds.planner.cut import DoesNotFit
from smartfrz_ds.planner.memory import least_limit
from smartfrz_ds.planner.plan import Phase, PhasePlan, Plan, Step, freeze_plan
from smartfrz_ds.planner.simulate import Schedule, check_schedule
from smartfrz_ds.telemetry.words import matched, some

_DEFAULT_FRACTIONS = "0.25,0.5,0.75"


def planned(
    *,
    profile: Path | None,
    shape: dict[str, int | None],
    tflops: float,
    recompute: bool,
    stages: int,
    replicas: int,
    micro_batches: int,
    zero: int,
    bandwidth: float,
    latency: float,
    overlap: bool,
    element_bytes: int,
    memory_limit: float | None,
    parts: str | None,
    order: str,
    frozen: str | None,
    schedule: str | None,
    steps: int,
    rows: int | None = None,
    cache_space: float = 4.3,
    hosts: int = 1,
) -> Plan:
    """Make the plan for the options of `smartfrz plan`, in their units: TFLOP/s, GB/s, microseconds, GB.

    Raises:
        ValueError: An option is wrong; the message has its value and what is allowed.
    """
    check_schedule(order, "--order")
    for option, value in (("--tflops", tflops), ("--bandwidth", bandwidth), ("--cache-space", cache_space)):
        if not value > 0:
            raise ValueError(f"{option}: got {value:g}; allowed: a number above 0")
    if (profile is None) == (shape["layers"] is None):
        raise ValueError("--profile, --layers: allowed: exactly one of them, a file with measured costs or a number of blocks")
    if frozen is not None and schedule is not None:
        raise ValueError("--frozen, --schedule: allowed: at most one of them")
    if zero > 1 and stages > 1:
        raise ValueError(f"--zero: got {zero} with --pp {stages}; allowed in a pipeline: 0 or 1")
    if rows is not None and stages > 1:
        raise ValueError(f"--rows: got {rows} with --pp {stages}; allowed without a pipeline, which has no prefix cache yet")
    costs = load_costs(profile) if profile else _estimated(shape, tflops, recompute, replicas if zero else 1)
    if stages > len(costs):
        raise ValueError(f"--pp: got {stages}; allowed: at most {len(costs)}, one layer per stage")
    link = Link(latency=latency * 1e-6, bandwidth=bandwidth * 1e9)
    cluster = Cluster(
        replicas=replicas,
        zero=zero,
        between_stages=link,
        between_replicas=link,
        gradient_bytes=element_bytes,
        weight_bytes=element_bytes,
        state_bytes=8 if element_bytes >= 4 and not zero else 12,  # ZeRO keeps master weights for fp32 too
        overlap=overlap,
    )
    if schedule is not None:
        phases = parse_schedule(schedule, len(costs))
    else:
        phases = parse_fractions(_DEFAULT_FRACTIONS if frozen is None else frozen, len(costs))
    cache = None
    if rows is not None:
        batch = shape["micro_batch"] or 1
        epochs = steps * micro_batches * batch * replicas / rows
        cache = CacheUse(epochs=epochs, rows=rows, batch=batch, space=cache_space * 1e9, hosts=hosts)
    try:
        return freeze_plan(
            costs,
            phases,
            stages=stages,
            micro_batches=micro_batches,
            cluster=cluster,
            steps=steps,
            parts=None if parts is None else parse_parts(parts, len(costs), stages),
            schedule="gpipe" if order == "gpipe" else "1f1b",
            memory_limit=None if memory_limit is None else memory_limit * 1e9,
            cache=cache,
        )
    except DoesNotFit:
        counts = {p.frozen for p in phases} | ({0} if parts is None else set())
        kind: Schedule = "gpipe" if order == "gpipe" else "1f1b"
        need = max(least_limit(costs, stages, micro_batches, count, cluster=cluster, schedule=kind) for count in counts) / 1e9
        lacks = need - (memory_limit or 0.0)
        raise ValueError(
            f"--memory-limit: got {memory_limit:g}, which lacks {lacks:.3g} GB; allowed: at least {need:.4g} GB a rank, which the best "
            f"partition of {len(costs)} layers into {some(stages, 'stage')} takes with {some(min(counts), 'layer')} frozen"
        ) from None


def parse_parts(text: str, layers: int, stages: int) -> list[int]:
    """Parse the stage bounds of --parts: "0,9,18"."""
    try:
        bounds = [int(part) for part in text.split(",")]
    except ValueError:
        bounds = []
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != layers or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"--parts: got {text!r}; allowed: {stages + 1} increasing comma-separated integers from 0 to {layers}")
    return bounds


def parse_fractions(text: str, layers: int) -> list[Phase]:
    """Parse the cases of --frozen: "0.25,0.5" of all layers, rounded down. Each case covers the whole run."""
    return [Phase(share=1.0, frozen=_layers("--frozen", text, part, layers)) for part in text.split(",")]


def parse_schedule(text: str, layers: int) -> list[Phase]:
    """Parse the phases of --schedule: "0.4:0,0.6:0.5", the share of the run and the fraction of layers frozen in it."""
    allowed = "comma-separated SHARE:FRACTION, e.g. 0.4:0,0.6:0.5; shares above 0 that add up to 1"
    phases = []
    for part in text.split(","):
        share, colon, fraction = part.partition(":")
        if not colon or not 0 < _number(share) <= 1:
            raise ValueError(f"--schedule: got {text!r}; allowed: {allowed}")
        phases.append(Phase(share=_number(share), frozen=_layers("--schedule", text, fraction, layers)))
    if not math.isclose(sum(p.share for p in phases), 1, abs_tol=1e-6):
        raise ValueError(f"--schedule: got {text!r}, whose shares add up to {sum(p.share for p in phases):g}; allowed: {allowed}")
    return phases


def render(plan: Plan, *, of_run: bool) -> str:
    """Format the plan as a table.

    Args:
        plan: The plan.
        of_run: Whether the phases make up a run; then the hours are included.
    """
    whole, stages = plan.unfrozen, len(plan.unfrozen.parts) - 1
    with_cache = any(p.cached is not None for p in plan.phases)
    times = ["pruned", "rebalanced"] if stages > 1 else ["step"]
    times += ["cached"] if with_cache else []
    shown = [(label, of) for label, applies, of in _COLUMNS if applies(plan)]
    rows = [["share", "frozen", *(cell for label in times for cell in (label, "")), *(label for label, _ in shown)]]
    rows.append(["", "0", *[_ms(whole.seconds), "1.00x"] * len(times), *(of(whole) for _, of in shown)])
    for p in plan.phases:
        seconds = [p.pruned.seconds, *([p.rebalanced.seconds] if stages > 1 else []), *([] if p.cached is None else [p.cached.seconds])]
        speeds = [x for s in seconds for x in (_ms(s), f"{whole.seconds / s if s else 1:.2f}x")]
        rows.append([f"{p.share:.0%}", str(p.frozen), *speeds, *(of(p.rebalanced) for _, of in shown)])
    if not of_run:
        rows = [row[1:] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(rows[0]) - 1 if stages > 1 else len(rows[0])
    lines = [
        "  ".join(cell.rjust(width) if i < last else cell for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    lines.append("")
    notes = ["Times per optimizer step"]
    notes += ["to replicas: sent by the busiest rank"] if plan.ranks > stages else []
    notes += ["between stages: by all ranks of a pipeline"] if stages > 1 else []
    notes += ["idle: share of time"] if plan.ranks > 1 else []
    notes += ["weights to memory: of the fullest rank" + (", rebalanced" if stages > 1 else "")] if whole.memory.total else []
    lines.append("; ".join(notes) + ".")
    lines += [_cache_line(p, p.cached) for p in plan.phases if p.cached is not None and p.frozen]
    if of_run:
        hours = plan.hours
        for label in times:
            planned_hours = hours["pruned" if label == "step" else label]
            saved = hours["unfrozen"] - planned_hours
            share = saved / hours["unfrozen"] if hours["unfrozen"] else 0.0
            lines.append(
                f"{'frozen' if label == 'step' else label}: {planned_hours:.1f} of {hours['unfrozen']:.1f} hours for {plan.steps} steps, "
                f"saves {saved:.1f} h ({share:.0%}), {saved * plan.ranks:.0f} device hours on {plan.ranks} devices; "
                f"{matched(plan.steps, share)}"
            )
    return "\n".join(line.rstrip() for line in lines)


def _cache_line(phase: PhasePlan, cached: CachedPhase) -> str:
    """Describe the prefix cache in a phase."""
    need = f"{_size(cached.need)} a host ({_size(cached.row_bytes)} a sample)"
    if cached.reason:
        return f"Cached, {phase.frozen} frozen: off, {cached.reason}; all samples would take {need}."
    found = "" if cached.hit_rate > 0.999 else f", {cached.hit_rate:.0%} of the micro-batches hit"
    return (
        f"Cached, {phase.frozen} frozen: {_ms(cached.first)} in the first epoch, {_ms(cached.hit)} where all samples are stored{found}; "
        f"samples take {need}."
    )


def _estimated(shape: dict[str, int | None], tflops: float, recompute: bool, shards: int) -> list[LayerCost]:
    sizes = {name: value for name, value in shape.items() if value is not None}
    return estimate_costs(**sizes, flops=tflops * 1e12, shards=shards, recompute=recompute)


def _layers(option: str, text: str, fraction: str, layers: int) -> int:
    value = _number(fraction)
    if not 0 <= value < 1:
        raise ValueError(f"{option}: got {text!r}; allowed: fractions of the layers from 0 to below 1")
    return min(int(value * layers + 1e-9), layers - 1)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.2f} s"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


# Column, whether it applies to the plan, and its cell.
_COLUMNS: tuple[tuple[str, Callable[[Plan], bool], Callable[[Step], str]], ...] = (
    ("idle", lambda plan: plan.ranks > 1, lambda step: f"{step.idle:.0%}"),
    ("weights", lambda plan: plan.unfrozen.memory.weights > 0, lambda step: _size(step.memory.weights)),
    ("gradients", lambda plan: plan.unfrozen.memory.gradients > 0, lambda step: _size(step.memory.gradients)),
    ("optimizer", lambda plan: plan.unfrozen.memory.optimizer > 0, lambda step: _size(step.memory.optimizer)),
    ("activations", lambda plan: plan.unfrozen.memory.activations > 0, lambda step: _size(step.memory.activations)),
    ("memory", lambda plan: plan.unfrozen.memory.total > 0, lambda step: _size(step.memory.total)),
    ("to replicas", lambda plan: plan.ranks >= len(plan.unfrozen.parts), lambda step: _size(step.replica_bytes)),
    ("between stages", lambda plan: len(plan.unfrozen.parts) > 2, lambda step: _size(step.stage_bytes)),
    ("layers of the stages", lambda plan: len(plan.unfrozen.parts) > 2, lambda step: "+".join(str(b - a) for a, b in pairwise(step.parts))),
)
