"""Measures an example's run, and makes the table of one or several runs: `python launch/examples/table.py DIR [DIR …]`."""

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
from statistics import fmean, median
from typing import Any

import torch

from smartfrz_ds.backends.memory import storage_bytes
from smartfrz_ds.bench.wire import CollectiveBytes


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run, or the part of it after a resume, as rank 0 sees it.

    Attributes:
        policy: Name of the policy; "none" without freezing.
        layers: Number of layers that can freeze.
        scores: Final scores by name.
        first_step: The first step of this process.
        tokens: Tokens per step, 0 where this has no meaning.
        series: One value per step: `seconds`, `loss`, and if they are counted the bytes of gradients passed to reductions
            (`gradient_bytes`) and of weights gathered after the update (`weight_bytes`).
        optimizer_bytes: Live optimizer tensors, master weights included, after the first step and at the end.
        changed: Steps at whose end layers froze, thawed or moved.
        frozen: (layer, step) in the order of freezing.
        moves: (step, bounds of the pipeline's stages, predicted gain).
        plugin_seconds: Seconds in the plugin's hooks, without freezes.
        pause_seconds: Seconds in freezes.
        saved_flops_fraction: Fraction of the run's training FLOPs that freezing saved, in [0, 1].
        stages: For each rank of a pipeline its stage, the stage's entries at the start and at the end, frozen ones, optimizer bytes.
    """

    policy: str = "none"
    layers: int = 0
    scores: dict[str, float]
    first_step: int = 1
    tokens: int = 0
    series: dict[str, list[float]]
    optimizer_bytes: tuple[float, float]
    changed: list[int] = field(default_factory=list)
    frozen: list[tuple[str, int]] = field(default_factory=list)
    moves: list[tuple[int, list[int], float]] = field(default_factory=list)
    plugin_seconds: float = 0.0
    pause_seconds: float = 0.0
    saved_flops_fraction: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.first_step - 1 + len(self.series["seconds"])

    def usual(self, name: str) -> list[list[float]]:
        """Return the values of a series up to the first change of the layout, and those after the last one.

        The first three steps, in which the optimizer creates its state, and each step with a change and the next one are left out.
        """
        values = list(enumerate(self.series.get(name, ()), self.first_step))
        odd = {step + more for step in self.changed for more in (0, 1)} | {step for step, _ in values[: min(3, len(values) // 4)]}
        first, last = min(self.changed, default=self.steps), max((step for step in self.changed if step < self.steps), default=self.steps)
        parts = ((self.first_step, first), (last + 1, self.steps))
        return [[value for step, value in values if begin <= step <= end and step not in odd] for begin, end in parts]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read the file that `save` wrote; ValueError if it is missing or has another content."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file; the run did not finish") from error
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: not the results of a run: {error}") from error


class StepLog:
    """Measures a run step by step, on each rank for itself.

    Args:
        counted: the bytes that this rank hands to torch.distributed; None: not counted.
        first_step: Number of the first step.
    """

    def __init__(self, counted: CollectiveBytes | None = None, *, first_step: int = 1) -> None:
        self.series: dict[str, list[float]] = defaultdict(list)
        self._counted, self._gradients, self._first = counted, 0, first_step

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step, which is the block: its seconds, and the bytes of weights gathered since `backward_done`."""
        start, self._gradients = time.perf_counter(), 0
        if self._counted is not None:
            self._counted.take()
        yield
        self.series["seconds"].append(time.perf_counter() - start)
        if self._counted is not None:
            self.series["gradient_bytes"].append(self._gradients)
            self.series["weight_bytes"].append(sum(n for name, n in self._counted.take().items() if name.startswith("all_gather")))

    def backward_done(self) -> None:
        """Note the end of a backward: the bytes sent since the step began are gradients."""
        assert self._counted is not None
        self._gradients += sum(self._counted.take().values())

    def result(self, controller: Any, **more: Any) -> Result:
        """Return the run's result; controller: None without freezing; more: all other fields of `Result`."""
        more |= {"series": dict(self.series), "first_step": self._first}
        if controller is None:
            return Result(**more)
        report = controller.report()
        changes = [event for event in report.events if event.kind in ("freeze", "thaw", "rebalance")]
        return Result(
            policy=controller.config.policy,
            layers=len(report.layers),
            changed=sorted({event.step for event in changes}),
            frozen=[(name, event.step) for event in changes if event.kind == "freeze" for name in event.layers],
            moves=[(event.step, list(event.bounds), event.gain) for event in changes if event.kind == "rebalance"],
            plugin_seconds=report.plugin_seconds - report.freeze_seconds,
            pause_seconds=report.freeze_seconds,
            saved_flops_fraction=report.saved_flops_fraction,
            **more,
        )


def optimizer_bytes(engine: Any) -> int:
    """Live bytes of a DeepSpeed optimizer of ZeRO 0, 1 or 2 on this rank: its state and separate master weights, whole storages."""
    optimizer, own = engine.basic_optimizer, {id(parameter) for parameter in engine.module.parameters()}
    tensors = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return storage_bytes(tensors)


def sizes(bounds: Iterable[int]) -> str:
    """How many layers each stage of a pipeline holds: 3+2+3."""
    return "+".join(str(b - a) for a, b in pairwise(bounds))


def table(results: Sequence[Result]) -> str:
    """The results as text, one column a run. A cell `a -> b` is before the first freeze -> after the last."""
    rows: dict[str, list[str]] = {"policy": [r.policy for r in results]}
    rows |= {name: [f"{r.scores[name]:.4g}" if name in r.scores else "-" for r in results] for name in results[0].scores}
    rows |= {
        "training loss, last 20 steps": [f"{fmean(r.series['loss'][-20:]):.4f}" for r in results],
        "frozen": ["freezing is off" if r.policy == "none" else _how_many(r) for r in results],
        "time per step, median": [_pair(r, "seconds", lambda s: f"{s * 1e3:.0f} ms") for r in results],
        "  steps behind that median": [" -> ".join(str(len(part)) for part in r.usual("seconds") if part) for r in results],
        "tokens per second": [_pair(r, "seconds", lambda s, r=r: f"{r.tokens / s:,.0f}") if r.tokens else "" for r in results],
        "whole training": [f"{sum(r.series['seconds']):.1f} s" for r in results],
        "optimizer memory, this rank": [" -> ".join(map(_size, r.optimizer_bytes[: 1 + bool(r.frozen)])) for r in results],
        "gradients reduced per step": [_pair(r, "gradient_bytes", _size) for r in results],
        "weights gathered per step": [_pair(r, "weight_bytes", _size) for r in results],
        "plugin's share of the time": [
            "-" if r.policy == "none" else f"{r.plugin_seconds / sum(r.series['seconds']):.2%}" for r in results
        ],
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


def _pair(result: Result, name: str, show: Callable[[float], str]) -> str:
    return " -> ".join(show(median(part)) for part in result.usual(name) if part)


def _size(number: float) -> str:
    return f"{number / 1e6:.2f} MB"


def _how_many(result: Result) -> str:
    return f"{len(result.frozen)} of {result.layers} layers" if result.frozen else "nothing"


def _stages(result: Result) -> list[str]:
    """Which rank of a pipeline holds what; nothing for another run."""
    rows = [["stage", "entries at the start", "at the end", "of them frozen", "optimizer, MB"]]
    for held in result.stages:
        spans = [f"{first}-{last - 1} ({last - first})" for first, last in (held["start"], held["end"])]
        rows.append([str(held["stage"]), *spans, str(held["frozen"]), " -> ".join(f"{n / 1e6:.2f}" for n in held["bytes"])])
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
    lines = {step: ", ".join(names) for step, names in happened.items()}
    for step, bounds, gain in result.moves:
        lines[step] = "; ".join([*filter(None, [lines.get(step)]), f"stages of {sizes(bounds)} layers, {gain:.2f}x predicted"])
    return [f"{result.policy}, {result.steps} steps:", *(f"  step {step:>5}: {lines[step]}" for step in sorted(lines))]


if __name__ == "__main__":
    try:
        print(table([Result.load(Path(directory) / "results.json") for directory in sys.argv[1:]]))
    except ValueError as problem:
        sys.exit(str(problem))
