"""The results of an example's run, and the table of one or several runs: `python launch/examples/table.py DIR [DIR …]`."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smartfrz_ds.backends.base import storage_bytes

SKIPPED_STEPS = 3  # the first steps build the optimizer's state and warm the caches


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number before the first freeze and after the last one. `after` is None if nothing froze or no step followed."""

    before: float
    after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run, or the part of it after a resume. Bytes are counted on rank 0.

    Attributes:
        policy: Name of the policy; "none" without freezing.
        steps: The last step.
        first_step: The first step of this process.
        layers: Number of layers that can freeze.
        scores: Final scores by name.
        final_loss: Mean training loss of the last 20 steps on rank 0.
        train_seconds: Seconds of the training loop.
        step_seconds: Median seconds of a step, without the first steps and those next to a freeze, thaw or move.
        timed_steps: Number of steps in that median.
        optimizer_bytes: Live optimizer tensors, master weights included.
        gradient_bytes: Gradients passed to reductions per step.
        weight_bytes: Weights gathered per step after the update.
        frozen: (layer, step) in the order of freezing.
        moves: (step, bounds of the pipeline's stages, predicted gain).
        plugin_seconds: Seconds in the plugin's hooks, without freezes.
        pause_seconds: Seconds in freezes.
        saved_flops_fraction: Fraction of the run's training FLOPs that freezing saved, in [0, 1].
        tokens: Tokens per step, 0 where this has no meaning.
        stages: For each stage of a pipeline its entries at the start and at the end, frozen ones, and its ranks' optimizer bytes.
        series: One value per step, by name.
    """

    policy: str
    steps: int
    first_step: int = 1
    layers: int
    scores: dict[str, float]
    final_loss: float
    train_seconds: float
    step_seconds: Measured
    timed_steps: Measured
    optimizer_bytes: Measured
    gradient_bytes: Measured
    weight_bytes: Measured
    frozen: list[tuple[str, int]] = field(default_factory=list)
    moves: list[tuple[int, list[int], float]] = field(default_factory=list)
    plugin_seconds: float = 0.0
    pause_seconds: float = 0.0
    saved_flops_fraction: float = 0.0
    tokens: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read the file that `save` wrote.

        Raises:
            ValueError: The file is missing or has another content.
        """
        try:
            data = json.loads(path.read_text())
            data |= {key: Measured(**value) for key, value in data.items() if isinstance(value, dict) and "before" in value}
            data |= {key: [tuple(entry) for entry in data[key]] for key in ("frozen", "moves")}
            return cls(**data)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file; the run did not finish") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the results of a run: {error}") from error


class StepLog:
    """Measures a run step by step, on each rank for itself.

    Args:
        counted: Counts the bytes that this rank passes to torch.distributed (`smartfrz_ds.bench.wire.CollectiveBytes`); None: not counted.
        first_step: Number of the first step.
        settling: Steps after a freeze, thaw or move that are not timed (a pipeline sends its shapes again).
    """

    def __init__(self, counted: Any = None, *, first_step: int = 1, settling: int = 0) -> None:
        self.series: dict[str, list[float]] = defaultdict(list)
        self.first_step, self.settling = first_step, settling
        self._counted, self._begin = counted, time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step, which is the block: its seconds, and the bytes of weights gathered since `backward_done`."""
        start = time.perf_counter()
        if self._counted is not None:
            self._counted.take()
        yield
        self.series["seconds"].append(time.perf_counter() - start)
        if self._counted is not None:
            gathered = sum(size for name, size in self._counted.take().items() if name.startswith("all_gather"))
            self.series["weight_bytes"].append(gathered)

    def backward_done(self, *, reduced: float | None = None) -> None:
        """Note the end of the step's last backward.

        Args:
            reduced: Bytes of gradients if they are not counted here.
        """
        self.series["gradient_bytes"].append(sum(self._counted.take().values()) if reduced is None else reduced)

    def result(self, controller: Any, *, optimizer_bytes: tuple[float, float], **more: Any) -> Result:
        """Return the run's result.

        Args:
            controller: The run's controller, None without freezing.
            optimizer_bytes: After the first step and at the end.
            more: All other fields of `Result`.
        """
        report = None if controller is None else controller.report()
        events = () if report is None else report.events
        # Counted from 1 in this process; earlier freezes are at 0 and below.
        changed = {e.step - self.first_step + 1 for e in events if e.kind in ("freeze", "thaw", "rebalance")}
        first = min(changed, default=None)
        last = max((step for step in changed if step < len(self.series["seconds"])), default=None)
        odd = {step + more for step in changed for more in range(self.settling + 1)}
        seconds, timed = before_and_after(self.series["seconds"], first, last, skip=SKIPPED_STEPS, leave_out=odd)
        told: dict[str, Any] = {"policy": "none", "layers": 0}
        if report is not None:
            told = {"policy": controller.config.policy, "layers": len(controller.layers)}
            told["frozen"] = [(name, e.step) for e in events if e.kind == "freeze" for name in e.layers]
            told["moves"] = [(e.step, list(e.bounds), e.gain) for e in events if e.kind == "rebalance"]
            told |= {"plugin_seconds": report.plugin_seconds - report.freeze_seconds, "pause_seconds": report.freeze_seconds}
            told["saved_flops_fraction"] = report.saved_flops_fraction
        return Result(
            steps=self.first_step - 1 + len(self.series["seconds"]),
            first_step=self.first_step,
            final_loss=sum(self.series["loss"][-20:]) / max(1, len(self.series["loss"][-20:])),
            train_seconds=time.perf_counter() - self._begin,
            step_seconds=seconds,
            timed_steps=timed,
            optimizer_bytes=Measured(before=optimizer_bytes[0], after=optimizer_bytes[1] if told.get("frozen") else None),
            gradient_bytes=before_and_after(self.series["gradient_bytes"], first, last, skip=0, leave_out=set())[0],
            weight_bytes=before_and_after(self.series["weight_bytes"], first, last, skip=0, leave_out=changed)[0],
            series=dict(self.series),
            **told,
            **more,
        )


def optimizer_bytes(engine: Any) -> int:
    """Bytes of the optimizer on this rank: its state tensors and, where the engine has them, the fp32 master weights.

    Args:
        engine: a DeepSpeedEngine of ZeRO stage 0, 1 or 2, freezing or not. Storages are counted, each once and whole, so memory that a
            small view keeps alive is in the sum. The model's own weights are not.
    """
    optimizer, own = engine.basic_optimizer, {id(parameter) for parameter in engine.module.parameters()}
    tensors = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return storage_bytes(tensors)


def before_and_after(
    values: Sequence[float], first: int | None, last: int | None, *, skip: int, leave_out: set[int]
) -> tuple[Measured, Measured]:
    """Medians of a per-step series before the first freeze and after the last, and the number of steps behind each.

    Args:
        values: one number a step; values[i] belongs to step i + 1.
        first, last: steps at whose end layers froze, None where nothing did.
        skip: that many first steps are left out.
        leave_out: steps that are left out wherever they lie.
    """
    usable = [(step, value) for step, value in enumerate(values, 1) if step > skip and step not in leave_out]
    before = [value for step, value in usable if first is None or step <= first]
    after = [value for step, value in usable if last is not None and step > last]
    return (
        Measured(before=median(before) if before else float("nan"), after=median(after) if after else None),
        Measured(before=len(before), after=len(after) or None),
    )


def sizes(bounds: Iterable[int]) -> str:
    """How many layers each stage of a pipeline holds: 3+2+3."""
    return "+".join(str(b - a) for a, b in pairwise(bounds))


def table(results: Sequence[Result]) -> str:
    """The results as text, one column a run. A cell `a -> b` is before the first freeze -> after the last."""
    rows: dict[str, list[str]] = {"policy": [r.policy for r in results]}
    rows |= {name: [f"{r.scores[name]:.4g}" if name in r.scores else "-" for r in results] for name in results[0].scores}
    rows |= {
        "training loss, last 20 steps": [f"{r.final_loss:.4f}" for r in results],
        "frozen": [_frozen_in_words(r) for r in results],
        "time per step, median": [_pair(r.step_seconds, lambda s: f"{s * 1e3:.0f} ms") for r in results],
        "  steps behind that median": [_pair(r.timed_steps, lambda n: f"{n:.0f}") for r in results],
        "tokens per second": [_pair(r.step_seconds, lambda s, r=r: f"{r.tokens / s:,.0f}") if r.tokens else "" for r in results],
        "whole training": [f"{r.train_seconds:.1f} s" for r in results],
        "optimizer memory, this rank": [_pair(r.optimizer_bytes, _size) for r in results],
        "gradients reduced per step": [_pair(r.gradient_bytes, _size) for r in results],
        "weights gathered per step": [_pair(r.weight_bytes, _size) for r in results],
        "plugin's share of the time": ["-" if r.policy == "none" else f"{r.plugin_seconds / r.train_seconds:.2%}" for r in results],
        "pause for freezing, in all": [f"{r.pause_seconds:.2f} s" if r.frozen else "-" for r in results],
        "arithmetic saved, whole run": [f"{r.saved_flops_fraction:.1%}" if r.frozen else "-" for r in results],
    }
    lines = _aligned([[name, *cells] for name, cells in rows.items() if any(cells)])
    lines.insert(1, "-" * len(lines[0]))
    for result in results:
        lines += ["", *_stages(result), *_story(result)]
    return "\n".join(line.rstrip() for line in lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _pair(measured: Measured, show: Callable[[float], str]) -> str:
    """`a -> b`, or the one that there is: `before` is NaN where no step came before the first freeze."""
    return " -> ".join(show(number) for number in (measured.before, measured.after) if number is not None and number == number)


def _size(number: float) -> str:
    return f"{number / 1e6:.2f} MB"


def _frozen_in_words(result: Result) -> str:
    if result.policy == "none":
        return "freezing is off"
    return f"{len(result.frozen)} of {result.layers} layers" if result.frozen else "nothing"


def _stages(result: Result) -> list[str]:
    """Which stage of a pipeline holds what; nothing for another run."""
    rows = [["stage", "entries at the start", "at the end", "of them frozen", "optimizer of its ranks, MB"]]
    for index, stage in enumerate(result.stages):
        spans = [f"{first}-{last - 1} ({last - first})" for first, last in (stage["start"], stage["end"])]
        held = [", ".join(f"{size / 1e6:.2f}" for size in stage[when]) for when in ("bytes_before", "bytes_after")]
        rows.append([str(index), *spans, str(stage["frozen"]), " -> ".join(held)])
    return [*_aligned(rows), ""] if result.stages else []


def _story(result: Result) -> list[str]:
    """Which layers froze and moved and when, in words."""
    if result.policy == "none":
        return ["none: the same training without freezing."]
    if not result.frozen:
        return [f"{result.policy}: froze nothing in {result.steps} steps, so every number above is that of an ordinary run."]
    happened: dict[int, list[str]] = defaultdict(list)
    for name, step in result.frozen:
        happened[step].append(name)
    lines = {step: [", ".join(names)] for step, names in happened.items()}
    for step, bounds, gain in result.moves:
        lines.setdefault(step, []).append(f"stages of {sizes(bounds)} layers, {gain:.2f}x predicted")
    return [f"{result.policy}, {result.steps} steps:", *(f"  step {step:>5}: {'; '.join(lines[step])}" for step in sorted(lines))]


if __name__ == "__main__":
    try:
        print(table([Result.load(Path(directory) / "results.json") for directory in sys.argv[1:]]))
    except ValueError as problem:
        sys.exit(str(problem))
