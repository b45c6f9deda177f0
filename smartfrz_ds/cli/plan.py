"""The `smartfrz plan` command: makes a plan from its options, and a table from the plan."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from smartfrz_ds.planner.cached import CachedPhase, CacheUse
from smartfrz_ds.planner.costs import Cluster, LayerCost, Link, estimate_costs, load_costs
from smartfrz_ds.planner.cut import DoesNotFit
from smartfrz_ds.planner.plan import Phase, PhasePlan, Plan, Step, freeze_plan
from smartfrz_ds.planner.simulate import check_schedule

_TRAFFIC = ("idle", "to replicas", "between stages", "layers of the stages")
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
        state_bytes=12 if element_bytes < 4 else 8,  # fp32 weights have no separate master copy
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
        allowed = f"a number of GB that some partition of {len(costs)} layers into {stages} stages respects on every rank"
        raise ValueError(f"--memory-limit: got {memory_limit:g}; allowed: {allowed}") from None


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
    whole = plan.unfrozen
    with_cache = any(p.cached is not None for p in plan.phases)
    rows = [["share", "frozen", "pruned", "", "rebalanced", "", *(["cached", ""] if with_cache else []), *_TRAFFIC]]
    same = [_ms(whole.seconds), "1.00x"]
    rows.append(["", "0", *same * (3 if with_cache else 2), *_traffic(whole)])
    for p in plan.phases:
        seconds = [p.pruned.seconds, p.rebalanced.seconds, *([] if p.cached is None else [p.cached.seconds])]
        speeds = [x for s in seconds for x in (_ms(s), f"{whole.seconds / s if s else 1:.2f}x")]
        rows.append([f"{p.share:.0%}" if of_run else "", str(p.frozen), *speeds, *_traffic(p.rebalanced)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(rows[0]) - 1
    lines = [
        "  ".join(cell.rjust(width) if i < last else cell for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    lines.append("")
    lines.append(
        "Times per optimizer step. To replicas: sent by the busiest rank; between stages: by all ranks of a pipeline; idle: share of time."
    )
    lines += [_cache_line(p, p.cached) for p in plan.phases if p.cached is not None and p.frozen]
    if of_run:
        hours = plan.hours
        for label in ("pruned", "rebalanced", *(["cached"] if with_cache else [])):
            saved = hours["unfrozen"] - hours[label]
            share = saved / hours["unfrozen"] if hours["unfrozen"] else 0.0
            lines.append(
                f"{label}: {hours[label]:.1f} of {hours['unfrozen']:.1f} hours for {plan.steps} steps, "
                f"saves {saved:.1f} h ({share:.0%}), {saved * plan.ranks:.0f} device hours on {plan.ranks} devices"
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


def _traffic(step: Step) -> list[str]:
    layers = "+".join(str(b - a) for a, b in zip(step.parts, step.parts[1:], strict=False))
    return [f"{step.idle:.0%}", _size(step.replica_bytes), _size(step.stage_bytes), layers]


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
