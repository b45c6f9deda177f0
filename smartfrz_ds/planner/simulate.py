"""Simulate one train_batch of a pipeline in DeepSpeed's 1F1B order of instructions, or GPipe's.

A stage does one thing at a time. A send and its receive meet: the first one waits, then both are busy with the
message (p2p.send and p2p.recv of runtime/pipe/p2p.py block). `replay` follows the instructions one by one and is the
reference; `simulate` computes the same as a recurrence and skips the steady state, in which every two steps take
equally long. Time is an integer number of ticks, so that both agree exactly and every rank gets the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from .costs import Cluster, LayerCost, check_frozen, layer_backward

Schedule = Literal["1f1b", "gpipe"]
Kind = Literal["forward", "backward", "send_activation", "recv_activation", "send_grad", "recv_grad"]
TICK = 2.0**-40  # about a picosecond; a power of two, so that scaling adds no rounding error


class Deadlock(RuntimeError):
    """Stages wait for each other indefinitely; the message names what each of them waits for."""


class Instruction(NamedTuple):
    """One instruction of a stage's schedule."""

    kind: Kind
    micro_batch: int


class StageTimes(NamedTuple):
    """Ticks of each stage.

    Attributes:
        forward: Forward of one micro-batch.
        backward: Backward of one micro-batch.
        activation: Message of an activation between stages s and s + 1.
        gradient: Message of a gradient between stages s + 1 and s.
        reduction: Communication between replicas, after the last backward.
        optimizer: Update.
        active: The first stage that runs backward.
    """

    forward: list[int]
    backward: list[int]
    activation: list[int]
    gradient: list[int]
    reduction: list[int]
    optimizer: list[int]
    active: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Timing of a step.

    Attributes:
        makespan: Seconds of the step.
        busy: Seconds of computation (forward, backward, update) of each stage.
        idle: Share of all stages' time without computation, in [0, 1]. Messages and reductions count as idle.
    """

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
    """Simulate one step of a pipeline whose first `frozen` layers are frozen, with their backward pruned.

    Args:
        costs: Costs of the layers, front to back.
        parts: Bounds as in PipelineModule.parts: P + 1 numbers from 0 to the number of layers, at least one layer per
            stage.
        micro_batches: Micro-batches per step (gradient accumulation), >= 1.
        frozen: Number of frozen front layers.
        schedule: "1f1b" or "gpipe".
        cluster: The cluster; None: one replica and free communication.

    Raises:
        ValueError: Names the argument and what is allowed.
    """
    check_schedule(schedule)
    return timeline(stage_times(costs, parts, micro_batches, frozen, cluster), micro_batches, schedule, cluster or Cluster(), parts, frozen)


def stage_times(
    costs: Sequence[LayerCost], parts: Sequence[int], micro_batches: int, frozen: int = 0, cluster: Cluster | None = None
) -> StageTimes:
    """Compute the costs of each stage in ticks.

    Args:
        costs: Costs of the layers, front to back.
        parts: Bounds of the stages, as in PipelineModule.parts.
        micro_batches: Micro-batches per step, >= 1.
        frozen: Number of frozen front layers.
        cluster: The cluster; None: one replica and free communication.

    Raises:
        ValueError: An argument is out of range, or the ZeRO stage is above 1 in a pipeline of several stages.
    """
    check_frozen(costs, frozen)
    check_parts(parts, len(costs))
    if micro_batches < 1:
        raise ValueError(f"micro_batches: got {micro_batches!r}; allowed: an integer >= 1")
    cluster = cluster or Cluster()
    if cluster.zero > 1 and len(parts) > 2:
        raise ValueError(f"zero: got {cluster.zero} with {len(parts) - 1} stages; allowed in a pipeline: 0 or 1")
    backward = prefix_sums([ticks(b) for b in layer_backward(costs, frozen)])
    forward = prefix_sums([ticks(c.forward) for c in costs])
    optimizer = prefix_sums([0 if i < frozen else ticks(c.optimizer) for i, c in enumerate(costs)])
    weights = prefix_sums([c.weights for c in costs])
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
    """Simulate a step as `simulate` does, from given stage times.

    Args:
        times: Ticks of each stage.
        micro_batches: Micro-batches per step, >= 1.
        schedule: "1f1b" or "gpipe".
        cluster: The cluster.
        parts: Bounds of the stages, as in PipelineModule.parts.
        frozen: Number of frozen front layers.
    """
    stages = len(times.forward)
    clock = (_one_f_one_b if schedule == "1f1b" else _gpipe)(times, micro_batches)
    makespan = finish(clock, times, cluster, parts, frozen) * TICK
    busy = [micro_batches * (f + b) + o for f, b, o in zip(times.forward, times.backward, times.optimizer, strict=True)]
    idle = 1 - sum(busy) * TICK / (stages * makespan) if makespan else 0.0
    return Timeline(makespan=makespan, busy=tuple(b * TICK for b in busy), idle=max(0.0, idle))


def instructions(schedule: Schedule, stage: int, stages: int, micro_batches: int, active: int = 0) -> Iterator[Instruction]:
    """Yield the instructions of a stage, in order, up to its last backward.

    Source: for 1f1b, TrainSchedule.steps of DeepSpeed 0.19.8, runtime/pipe/schedule.py, pruned as in
    backends/pipeline/schedule.py; for gpipe, Huang et al. 2019, arXiv 1811.06965: all forwards, then all backwards,
    the last micro-batch first.

    Args:
        schedule: "1f1b" or "gpipe".
        stage: The stage, from 0.
        stages: Number of stages.
        micro_batches: Micro-batches per step.
        active: The first stage that runs backward.
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
    """Execute arbitrary instructions one by one; the simple reference simulation.

    Args:
        programs: Instructions of each stage.
        times: Ticks of each stage.

    Returns:
        Each stage's clock, in ticks, after its last instruction.

    Raises:
        Deadlock: Stages wait for each other indefinitely.
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
    """Return the ticks at the end of a step, given the stages' clocks after their last backward.

    Args:
        clock: Ticks of each stage after its last backward. Modified for stages with tied weights.
        times: Ticks of each stage.
        cluster: The cluster.
        parts: Bounds of the stages, as in PipelineModule.parts.
        frozen: Number of frozen front layers.

    Source:
        ReduceTiedGrads, ReduceGrads and OptimizerStep of DeepSpeed's runtime/pipe/engine.py.
    """
    after = 0
    for tied in cluster.tied:
        stages = sorted({next(s for s in range(len(parts) - 1) if layer < parts[s + 1]) for layer in tied.layers})
        cut = min(tied.layers) < frozen
        if len(stages) < 2 or (cut and cluster.tied_frozen):
            continue
        if cut:  # the front use has no gradient and receives the updated weight after the step
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
    """Convert seconds to ticks."""
    return round(seconds / TICK)


def prefix_sums(values: Sequence[int]) -> list[int]:
    """Return prefix sums: sums[b] - sums[a] is the sum of values[a:b]."""
    return list(accumulate(values, initial=0))


def are_bounds(bounds: Sequence[int], stages: int, layers: int) -> bool:
    """Return whether `bounds` cut the layers into stages of at least one layer each, as in PipelineModule.parts."""
    return len(bounds) == stages + 1 and (bounds[0], bounds[-1]) == (0, layers) and all(a < b for a, b in pairwise(bounds))


def check_parts(parts: Sequence[int], layers: int) -> None:
    """Raise ValueError unless `parts` are valid bounds."""
    if len(parts) < 2 or not are_bounds(parts, len(parts) - 1, layers):
        raise ValueError(f"parts: got {list(parts)!r}; allowed: increasing bounds from 0 to {layers}, at least one layer per stage")


def check_schedule(schedule: str, name: str = "schedule") -> None:
    """Raise ValueError unless the schedule is known."""
    if schedule not in ("1f1b", "gpipe"):
        raise ValueError(f"{name}: got {schedule!r}; allowed: '1f1b' or 'gpipe'")


def _one_f_one_b(times: StageTimes, micro_batches: int) -> list[int]:
    """Return the stages' clocks after a 1F1B schedule.

    In step t, stage s with even t + s runs the forward of micro-batch (t - s) / 2, and its neighbour s - 1 the
    backward of micro-batch (t + s) / 2 - P. Before that the two exchange the results of step t - 1, the gradient
    first. No other stages meet in that step.
    """
    forward, backward, activation, gradient, _, _, active = times
    stages = len(forward)
    clock = [0] * stages
    before: list[int] = []
    t, end = 0, 2 * (micro_batches + stages - 1)
    steady, fades = 2 * stages, 2 * micro_batches - 2  # between `steady` and `fades`, every stage is busy in each step
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
                    steady = end  # skip once only
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
