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
import torch.distributed as dist
from tqdm import tqdm

from smartfrz_ds.backends.memory import storage_bytes
from smartfrz_ds.bench.wire import CollectiveBytes
from smartfrz_ds.telemetry.words import matched_steps

_UNFROZEN = ("none", "matched")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run, or the part of it after a resume, as rank 0 sees it."""

    policy: str = "none"  # "none" without freezing, "matched" if it was also shortened to the arithmetic of a freezing run
    layers: int = 0  # that can freeze
    scores: dict[str, float]  # at the end, by name
    first_step: int = 1  # of this process
    tokens: int = 0  # per step, 0 where this has no meaning
    series: dict[
        str, list[float]
    ]  # one value a step: seconds, loss; if counted, gradient_bytes (reduced), weight_bytes (gathered after it)
    optimizer_bytes: tuple[float, float]  # live optimizer tensors, master weights included, after the first step and at the end
    changed: list[int] = field(default_factory=list)  # steps at whose end layers froze, thawed or moved
    frozen: list[tuple[str, int]] = field(default_factory=list)  # (layer, step) in the order of freezing
    moves: list[tuple[int, list[int], float]] = field(default_factory=list)  # (step, bounds of the pipeline's stages, predicted gain)
    plugin_seconds: float = 0.0  # in the plugin's hooks, without freezes
    pause_seconds: float = 0.0  # in freezes
    saved_flops_fraction: float = 0.0  # of the run's training FLOPs, in [0, 1]
    cached: list[int] = field(default_factory=list)  # steps in which the prefix cache skipped the frozen layers
    cache_note: str = ""  # what the prefix cache brought, or why it is not used; "" where it is switched off
    stages: list[dict[str, Any]] = field(default_factory=list)  # for each rank of a pipeline its stage, entries, frozen ones, bytes

    @property
    def steps(self) -> int:
        return self.first_step - 1 + len(self.series["seconds"])

    @property
    def matched_steps(self) -> int:
        """Steps of training without freezing that cost the arithmetic of this run."""
        return matched_steps(self.steps, self.saved_flops_fraction)

    def usual(self, name: str) -> list[list[float]]:
        """Return the values of a series up to the first change of the layout, and those after the last one.

        The first three steps, in which the optimizer creates its state, each step with a change and the next one, and those that the prefix
        cache made shorter are left out.
        """
        values = list(enumerate(self.series.get(name, ()), self.first_step))
        odd = {*self.cached, *(step + more for step in self.changed for more in (0, 1))} | {
            step for step, _ in values[: min(3, len(values) // 4)]
        }
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
    """Measures a run step by step, on each rank for itself, and shows its progress on rank 0.

    Args:
        steps: The steps of this process, the first of a run being 1.
        controller: None without freezing.
        memory: Returns the live bytes of the optimizer.

    Raises:
        ValueError: There is no step to do.
    """

    def __init__(self, steps: range, controller: Any, *, memory: Callable[[], int]) -> None:
        if not steps:
            raise ValueError(f"nothing to do: {steps.start - 1} steps are done, and --steps or --stop-after ask for {steps.stop - 1}")
        self.steps, self.series, self._cached, self._hits = steps, defaultdict[str, list[float]](list), list[int](), 0
        self._controller, self._memory, self._held = controller, memory, 0
        redrawn = 0.5 if sys.stderr.isatty() else 15.0  # seconds; rarely, if the output is a file
        self._bar = tqdm(
            total=steps.stop - 1,
            initial=steps.start - 1,
            disable=dist.get_rank() != 0,
            unit="step",
            mininterval=redrawn,
            smoothing=0.8,  # the rate of the last steps: it rises when layers freeze
        )

    @contextmanager
    def step(self) -> Iterator[dict[str, float]]:
        """Measure a step, which is the block; it puts the loss and other values of this step into the yielded dict."""
        start, values = time.perf_counter(), dict[str, float]()
        yield values
        for name, value in {"seconds": time.perf_counter() - start, **values}.items():
            self.series[name].append(value)
        if self._controller is not None and self._controller.config.cache.mode != "off":
            hits = self._controller.report().cache_hits
            if hits > self._hits:
                self._cached.append(self.steps.start - 1 + len(self.series["seconds"]))
            self._hits = hits
        if len(self.series["seconds"]) == 1:  # moments are made in the first step
            self._held = self._memory()
        self._bar.set_postfix_str(", ".join((f"loss {values['loss']:.3f}", *self._freezing())), refresh=False)
        self._bar.update()

    def _freezing(self) -> Iterator[str]:
        """What the progress bar says of freezing."""
        if self._controller is None:
            return
        yield f"frozen {len(self._controller.frozen)}/{len(self._controller.layers)}"
        if (stage := self._controller.next_stage) is not None:
            left = stage - self._controller.step
            yield f"next stage in {left} step{'s' if left > 1 else ''}"

    def result(self, **more: Any) -> Result:
        """End the progress bar, and return the run's result; more: the fields of `Result` that are not measured here."""
        self._bar.close()
        more |= {"series": dict(self.series), "first_step": self.steps.start, "optimizer_bytes": (self._held, self._memory())}
        if self._controller is None:
            return Result(**more)
        report = self._controller.report()
        changes = [event for event in report.events if event.kind in ("freeze", "thaw", "rebalance")]
        return Result(
            policy=self._controller.config.policy,
            layers=len(report.layers),
            changed=sorted({event.step for event in changes}),
            frozen=[(name, event.step) for event in changes if event.kind == "freeze" for name in event.layers],
            moves=[(event.step, list(event.bounds), event.gain) for event in changes if event.kind == "rebalance"],
            plugin_seconds=report.plugin_seconds - report.freeze_seconds,
            pause_seconds=report.freeze_seconds,
            saved_flops_fraction=report.saved_flops_fraction,
            cached=self._cached,
            cache_note=report.cache_note,
            **more,
        )


def optimizer_bytes(engine: Any) -> int:
    """Live bytes of a DeepSpeed optimizer of ZeRO 0, 1 or 2 on this rank: its state and separate master weights, whole storages."""
    optimizer, own = engine.basic_optimizer, {id(parameter) for parameter in engine.module.parameters()}
    tensors = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return storage_bytes(tensors)


def gathered_bytes(counted: CollectiveBytes) -> int:
    """Bytes of weights that this rank gathered since the last `take`."""
    return sum(size for name, size in counted.take().items() if name.startswith("all_gather"))


def sizes(bounds: Iterable[int]) -> str:
    """How many layers each stage of a pipeline holds: 3+2+3."""
    return "+".join(str(b - a) for a, b in pairwise(bounds))


def table(results: Sequence[Result]) -> str:
    """The results as text, one column a run. A cell `a -> b` is before the first freeze -> after the last."""
    columns = [_cells(result) for result in results]
    shown = [name for name in columns[0] if any(cells.get(name) for cells in columns)]
    lines = _aligned([[name, *(cells.get(name, "-") for cells in columns)] for name in shown])
    lines.insert(1, "-" * len(lines[0]))
    for result in results:
        lines += ["", *_stages(result), *_story(result)]
    return "\n".join(line.rstrip() for line in lines)


def _cells(result: Result) -> dict[str, str]:
    seconds, freezing, froze = result.series["seconds"], result.policy not in _UNFROZEN, len(result.frozen)

    def usual(name: str, show: Callable[[float], str]) -> str:
        return " -> ".join(show(median(part)) for part in result.usual(name) if part)

    def size(number: float) -> str:
        return f"{number / 1e6:.2f} MB"

    return {
        "policy": result.policy,
        **{name: f"{score:.4g}" for name, score in result.scores.items()},
        "training loss, last 20 steps": f"{fmean(result.series['loss'][-20:]):.4f}",
        "frozen": (f"{froze} of {result.layers} layers" if froze else "nothing") if freezing else "freezing is off",
        "time per step, median": usual("seconds", lambda s: f"{s * 1e3:.0f} ms"),
        "  steps behind that median": " -> ".join(str(len(part)) for part in result.usual("seconds") if part),
        "  with the prefix cache": _with_cache(result),
        "tokens per second": usual("seconds", lambda s: f"{result.tokens / s:,.0f}") if result.tokens else "",
        "whole training": f"{sum(seconds):.1f} s",
        "optimizer memory, this rank": " -> ".join(map(size, result.optimizer_bytes[: 2 if froze else 1])),
        "gradients reduced per step": usual("gradient_bytes", size),
        "weights gathered per step": usual("weight_bytes", size),
        "plugin's share of the time": f"{result.plugin_seconds / sum(seconds):.2%}" if freezing else "-",
        "pause for freezing, in all": f"{result.pause_seconds:.2f} s" if froze else "-",
        "arithmetic saved, whole run": f"{result.saved_flops_fraction:.1%}" if froze else "-",
    }


def _with_cache(result: Result) -> str:
    steps = [seconds for step, seconds in enumerate(result.series["seconds"], result.first_step) if step in set(result.cached)]
    return f"{median(steps) * 1e3:.0f} ms ({len(steps)} steps)" if steps else "-" if result.cache_note else ""


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


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
    if result.policy == "matched":
        return [f"matched: {result.steps} steps without freezing, which cost the arithmetic of a freezing run."]
    if not result.frozen:
        return [f"{result.policy}: froze nothing in {result.steps} steps, so every number above is that of an ordinary run."]
    lines = [f"{result.policy}, {result.steps} steps:"]
    for step in sorted({step for _, step in result.frozen} | {step for step, *_ in result.moves}):
        names = ", ".join(name for name, at in result.frozen if at == step)
        moved = [f"stages of {sizes(bounds)} layers, {gain:.2f}x predicted" for at, bounds, gain in result.moves if at == step]
        lines.append(f"  step {step:>5}: {'; '.join(filter(None, [names, *moved]))}")
    return [*lines, f"  prefix cache: {result.cache_note}"] if result.cache_note else lines


if __name__ == "__main__":
    try:
        print(table([Result.load(Path(directory) / "results.json") for directory in sys.argv[1:]]))
    except ValueError as problem:
        sys.exit(str(problem))
