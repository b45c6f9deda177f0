"""One train_batch of a pipeline, simulated: DeepSpeed's 1F1B order of instructions, and GPipe's.

A stage does one thing after the other. A send and its receive are one meeting: whoever comes first waits, then both are busy with the
message (p2p.send and p2p.recv of runtime/pipe/p2p.py block). `replay` follows the instructions one by one and is the reference; `simulate`
is the same as a recurrence, and jumps over the steady state, in which every two steps take equally long.
Time is kept as an integer number of ticks, so that both agree exactly and every rank finds the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from .costs import Cluster, LayerCost, check_frozen, layer_backward

Schedule = Literal["1f1b", "gpipe"]
Kind = Literal["forward", "backward", "send_activation", "recv_activation", "send_grad", "recv_grad"]
TICK = 2.0**-40  # about a picosecond; a power of two, so that scaling adds no rounding


class Deadlock(RuntimeError):
    """Stages wait for each other; the message names what each waits for."""


class Instruction(NamedTuple):
    kind: Kind
    micro_batch: int


class StageTimes(NamedTuple):
    """In ticks, for each stage. activation[s], gradient[s]: messages between s and s + 1. reduction: between replicas, after the last
    backward. active: the first stage that runs backward."""

    forward: list[int]
    backward: list[int]
    activation: list[int]
    gradient: list[int]
    reduction: list[int]
    optimizer: list[int]
    active: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """makespan: seconds of a step. busy: of each stage, seconds of computing (forward, backward, update). idle: share of all stages' time
    in which nothing is computed, in [0, 1]. Messages and reductions count as idle."""

    makespan: float
    busy: tuple[float, ...]
    idle: float


def simulate(
    costs: Sequence[LayerCost],
    parts: Sequence[int],
    micro_batches: int,
    frozen: int = 0,
    *,
    schedule: Schedule = "1f1b",
    cluster: Cluster | None = None,
) -> Timeline:
    """One step of a pipeline whose first `frozen` layers are frozen, their backward pruned.

    parts: as PipelineModule.parts: P + 1 bounds, from 0 to the number of layers; each stage has at least one.
    micro_batches: of a step (gradient accumulation), >= 1.
    ValueError names the argument and what is allowed.
    """
    check_schedule(schedule)
    return timeline(stage_times(costs, parts, micro_batches, frozen, cluster), micro_batches, schedule, cluster or Cluster(), parts, frozen)


def stage_times(
    costs: Sequence[LayerCost], parts: Sequence[int], micro_batches: int, frozen: int = 0, cluster: Cluster | None = None
) -> StageTimes:
    """What each stage costs, in ticks: arguments as in `simulate`."""
    check_frozen(costs, frozen)
    check_parts(parts, len(costs))
    if micro_batches < 1:
        raise ValueError(f"micro_batches: got {micro_batches!r}; allowed: an integer >= 1")
    cluster = cluster or Cluster()
    if cluster.zero > 1 and len(parts) > 2:
        raise ValueError(f"zero: got {cluster.zero} with {len(parts) - 1} stages; allowed in a pipeline: 0 or 1")
    backward = sums([ticks(b) for b in layer_backward(costs, frozen)])
    forward = sums([ticks(c.forward) for c in costs])
    optimizer = sums([0 if i < frozen else ticks(c.optimizer) for i, c in enumerate(costs)])
    weights = sums([c.weights for c in costs])
    messages = [ticks(cluster.between_stages.seconds(costs[bound - 1].output_bytes)) for bound in parts[1:-1]]
    bounds = list(pairwise(parts))
    forwards, backwards = ([s[b] - s[a] for a, b in bounds] for s in (forward, backward))
    reduction = []
    for stage, (a, b) in enumerate(bounds):
        still = max(a, min(b, frozen))
        traffic = cluster.traffic(weights[b] - weights[still], weights[still] - weights[a], micro_batches)
        exchange = cluster.exchange_seconds(traffic, micro_batches, forwards[stage] * TICK, backwards[stage] * TICK)
        reduction.append(ticks(exchange))
    active = next(stage for stage, (_, b) in enumerate(bounds) if b > frozen)
    return StageTimes(forwards, backwards, messages, messages, reduction, [optimizer[b] - optimizer[a] for a, b in bounds], active)


def timeline(times: StageTimes, micro_batches: int, schedule: Schedule, cluster: Cluster, parts: Sequence[int], frozen: int) -> Timeline:
    """As `simulate`, for stage times at hand."""
    stages = len(times.forward)
    clock = (_one_f_one_b if schedule == "1f1b" else _gpipe)(times, micro_batches)
    makespan = finish(clock, times, cluster, parts, frozen) * TICK
    busy = [micro_batches * (f + b) + o for f, b, o in zip(times.forward, times.backward, times.optimizer, strict=True)]
    idle = 1 - sum(busy) * TICK / (stages * makespan) if makespan else 0.0
    return Timeline(makespan=makespan, busy=tuple(b * TICK for b in busy), idle=max(0.0, idle))


def instructions(schedule: Schedule, stage: int, stages: int, micro_batches: int, active: int = 0) -> Iterator[Instruction]:
    """What a stage does, in order, up to its last backward. active: the first stage that runs backward.

    1f1b: DeepSpeed 0.19.8, runtime/pipe/schedule.py, TrainSchedule.steps, pruned as backends/pipe_schedule.py does.
    gpipe: all forwards, then all backwards, the last micro-batch first (Huang et al. 2019, arXiv 1811.06965).
    """
    trains, sends_grad = stage >= active, stage > active
    first, last = stage == 0, stage == stages - 1
    if schedule == "gpipe":
        for m in range(micro_batches):
            if not first:
                yield Instruction("recv_activation", m)
            yield Instruction("forward", m)
            if not last:
                yield Instruction("send_activation", m)
        for m in reversed(range(micro_batches) if trains else ()):
            if not last:
                yield Instruction("recv_grad", m)
            yield Instruction("backward", m)
            if sends_grad:
                yield Instruction("send_grad", m)
        return
    for step in range(2 * (micro_batches + stages - 1)):
        if (step + stage) % 2 == 0:
            done, m = (step - 2 * stages + stage) // 2, (step - stage) // 2
            if sends_grad and 0 <= done < micro_batches:
                yield Instruction("send_grad", done)
            if 0 <= m < micro_batches:
                if not first:
                    yield Instruction("recv_activation", m)
                yield Instruction("forward", m)
        else:
            done, m = (step - 1 - stage) // 2, (step - 2 * stages + 1 + stage) // 2
            if trains and not last and 0 <= m < micro_batches:
                yield Instruction("recv_grad", m)
            if not last and 0 <= done < micro_batches:
                yield Instruction("send_activation", done)
            if trains and 0 <= m < micro_batches:
                yield Instruction("backward", m)


_PARTNER: dict[Kind, tuple[int, Kind]] = {
    "send_activation": (1, "recv_activation"),
    "recv_activation": (-1, "send_activation"),
    "send_grad": (-1, "recv_grad"),
    "recv_grad": (1, "send_grad"),
}


def replay(programs: Sequence[Iterable[Instruction]], times: StageTimes) -> list[int]:
    """Each stage's clock, in ticks, when it has done all of its instructions. The plain simulation: any order of instructions.

    Raises Deadlock when stages wait for each other for ever.
    """
    left = [iter(program) for program in programs]
    now: list[Instruction | None] = [next(program, None) for program in left]
    clock = [0] * len(left)
    moved = True
    while moved:
        moved = False
        for stage, program in enumerate(left):
            while (at := now[stage]) is not None:
                if at.kind == "forward":
                    clock[stage] += times.forward[stage]
                elif at.kind == "backward":
                    clock[stage] += times.backward[stage]
                else:
                    way, kind = _PARTNER[at.kind]
                    other = stage + way
                    if not 0 <= other < len(left) or now[other] != Instruction(kind, at.micro_batch):
                        break
                    cost = (times.activation if "activation" in kind else times.gradient)[min(stage, other)]
                    clock[stage] = clock[other] = max(clock[stage], clock[other]) + cost
                    now[other] = next(left[other], None)
                now[stage] = next(program, None)
                moved = True
    if any(at is not None for at in now):
        raise Deadlock("; ".join(f"stage {s} waits in {at.kind} of micro-batch {at.micro_batch}" for s, at in enumerate(now) if at))
    return clock


def finish(clock: list[int], times: StageTimes, cluster: Cluster, parts: Sequence[int], frozen: int) -> int:
    """Ticks at the end of a step, from the stages' clocks after their last backward (engine.py: ReduceTiedGrads, ReduceGrads,
    OptimizerStep). The clocks of stages with tied weights are changed."""
    after = 0
    for tied in cluster.tied:
        stages = sorted({next(s for s in range(len(parts) - 1) if layer < parts[s + 1]) for layer in tied.layers})
        cut = min(tied.layers) < frozen
        if len(stages) < 2 or (cut and cluster.tied_frozen):
            continue
        if cut:  # the front use has no gradient; the updated weight is sent to it after the step
            after += ticks(cluster.between_stages.seconds(tied.nbytes))
            continue
        ring = 2 * tied.nbytes * (len(stages) - 1) / len(stages)
        met = max(clock[s] for s in stages) + ticks(cluster.between_stages.seconds(ring))
        for s in stages:
            clock[s] = met
    reduced = [c + r for c, r in zip(clock, times.reduction, strict=True)]
    if cluster.norm:
        return max(reduced) + max(times.optimizer) + after
    return max(r + o for r, o in zip(reduced, times.optimizer, strict=True)) + after


def ticks(seconds: float) -> int:
    return round(seconds / TICK)


def sums(values: Sequence[int]) -> list[int]:
    """Prefix sums: sums[b] - sums[a] is the sum of values[a:b]."""
    return list(accumulate(values, initial=0))


def are_bounds(bounds: Sequence[int], stages: int, layers: int) -> bool:
    """Whether these cut so many layers into so many stages of at least one layer each, as PipelineModule.parts."""
    return len(bounds) == stages + 1 and (bounds[0], bounds[-1]) == (0, layers) and all(a < b for a, b in pairwise(bounds))


def check_parts(parts: Sequence[int], layers: int) -> None:
    if len(parts) < 2 or not are_bounds(parts, len(parts) - 1, layers):
        raise ValueError(f"parts: got {list(parts)!r}; allowed: rising bounds from 0 to {layers}, at least one layer a stage")


def check_schedule(schedule: str, name: str = "schedule") -> None:
    if schedule not in ("1f1b", "gpipe"):
        raise ValueError(f"{name}: got {schedule!r}; allowed: '1f1b' or 'gpipe'")


def _one_f_one_b(times: StageTimes, micro_batches: int) -> list[int]:
    """In step t, stage s with t + s even does forward of (t - s) / 2 and its neighbour s - 1 backward of (t + s) / 2 - P; before that the
    two exchange what they made in step t - 1, the gradient first. No other two stages meet in that step."""
    forward, backward, activation, gradient, _, _, active = times
    stages = len(forward)
    clock = [0] * stages
    before: list[int] = []
    t, end = 0, 2 * (micro_batches + stages - 1)
    steady, fades = 2 * stages, 2 * micro_batches - 2  # from `steady` to `fades`, every stage has something to do in each step
    while t < end:
        f_low, f_high = t - fades, t
        b_low, b_high = max(2 * stages - t, active + 1), 2 * stages - t + fades
        low = max(0, min(f_low, b_low))
        for s in range(low + (low + t) % 2, min(stages, max(f_high, b_high)) + 1, 2):
            runs_forward, runs_backward = f_low <= s <= f_high and s < stages, b_low <= s <= b_high
            if 0 < s < stages and (runs_forward or runs_backward):
                now, other = clock[s - 1], clock[s]
                if other > now:
                    now = other
                if runs_backward:
                    now += gradient[s - 1]
                    if runs_forward:
                        now += activation[s - 1]
                    clock[s - 1] = now + backward[s - 1]
                else:
                    now += activation[s - 1]
                    clock[s - 1] = now
                clock[s] = now + forward[s] if runs_forward else now
            elif runs_forward and s == 0:
                clock[0] += forward[0]
            elif runs_backward and s == stages:
                clock[-1] += backward[-1]
        if t % 2 and steady < t < fades:
            if before:
                gain = clock[0] - before[0]
                if all(new - old == gain for new, old in zip(clock, before, strict=True)):
                    periods = (fades - t) // 2
                    clock = [c + periods * gain for c in clock]
                    t += 2 * periods
                    before = []
                    steady = end  # once is enough
            if steady < end:
                before = list(clock)
        t += 1
    return clock


def _gpipe(times: StageTimes, micro_batches: int) -> list[int]:
    forward, backward, activation, gradient, _, _, active = times
    stages = len(forward)
    clock = [0] * stages
    last = stages - 1

    def all_forward() -> None:
        clock[0] += forward[0]
        for s in range(1, stages):
            met = max(clock[s - 1], clock[s]) + activation[s - 1]
            clock[s - 1], clock[s] = met, met + forward[s]

    def all_backward() -> None:
        clock[last] += backward[last]
        for s in range(last - 1, active - 1, -1):
            met = max(clock[s + 1], clock[s]) + gradient[s]
            clock[s + 1], clock[s] = met, met + backward[s]

    for sweep, moving in ((all_forward, slice(0, stages)), (all_backward, slice(active, stages))):
        done = 0
        while done < micro_batches:
            before = clock[moving]
            sweep()
            done += 1
            gains = {new - old for new, old in zip(clock[moving], before, strict=True)}
            if len(gains) == 1:
                gain = gains.pop() * (micro_batches - done)
                clock[moving] = [c + gain for c in clock[moving]]
                break
    return clock
