"""What one run of the demo gave, and the table of one or several runs: `python launch/results.py DIR [DIR …]`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number before the first freeze and after the last one; `after` is None where nothing froze or no step came after."""

    before: float
    after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    policy: the policy's name, "none" for a run without freezing.
    steps, layers: optimizer steps of the run; freezable layers of the model, the head too (0 where nobody asked for them).
    correct, held_out: held-out texts that were classified right, of how many.
    final_loss: mean training loss of the last 20 steps on rank 0.
    frozen: [layer, step] in the order of freezing.
    train_seconds: the training loop, evaluation not counted.
    step_seconds: median wall time of a step (seconds); the first three steps and those in which a layer froze are left out.
    timed_steps: how many steps stand behind the two medians.
    optimizer_bytes: live optimizer tensors on rank 0, master weights included.
    gradient_bytes, weight_bytes: bytes per step on rank 0, counted: gradients handed to reductions, weights gathered after the update.
    plugin_seconds, pause_seconds: time in the plugin's hooks, freezes not counted; time in the freezes.
    saved_flops_fraction: the plugin's own count of the arithmetic that was saved, of the whole run, in [0, 1].
    """

    policy: str
    steps: int
    layers: int
    correct: int
    held_out: int
    final_loss: float
    train_seconds: float
    step_seconds: Measured
    timed_steps: Measured
    optimizer_bytes: Measured
    gradient_bytes: Measured
    weight_bytes: Measured
    frozen: list[tuple[str, int]] = field(default_factory=list)
    plugin_seconds: float = 0.0
    pause_seconds: float = 0.0
    saved_flops_fraction: float = 0.0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Reads what `save` wrote; ValueError where the file isn't there or isn't that."""
        try:
            data = json.loads(path.read_text())
            for key in ("step_seconds", "timed_steps", "optimizer_bytes", "gradient_bytes", "weight_bytes"):
                data[key] = Measured(**data[key])
            data["frozen"] = [(name, step) for name, step in data["frozen"]]
            return cls(**data)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file; the run did not come to its end") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the results of a run: {error}") from error


def before_and_after(
    values: Sequence[float], first_freeze: int | None, last_freeze: int | None, *, skip: int, leave_out: set[int]
) -> tuple[Measured, Measured]:
    """Medians of a per-step series before the first freeze and after the last, and how many steps stand behind each.

    values: one number a step; values[i] belongs to step i + 1.
    first_freeze, last_freeze: steps at whose end layers froze, None where nothing did.
    skip: that many first steps are left out (warming up).
    leave_out: steps that are left out wherever they lie.
    """
    usable = [(i + 1, value) for i, value in enumerate(values) if i >= skip and i + 1 not in leave_out]
    before = [value for step, value in usable if first_freeze is None or step <= first_freeze]
    after = [value for step, value in usable if last_freeze is not None and step > last_freeze]
    median = Measured(
        before=statistics.median(before) if before else float("nan"),
        after=statistics.median(after) if after else None,
    )
    return median, Measured(before=len(before), after=len(after) if after else None)


def _pair(measured: Measured, show: Callable[[float], str]) -> str:
    return show(measured.before) if measured.after is None else f"{show(measured.before)} -> {show(measured.after)}"


def _size(number: float) -> str:
    return f"{number / 1e6:.2f} MB"


def _frozen_in_words(result: Result) -> str:
    if result.policy == "none":
        return "freezing is off"
    if not result.frozen:
        return "nothing"
    return f"{len(result.frozen)} of {result.layers} layers"


def table(results: Sequence[Result]) -> str:
    """The results as text, one column a run. A cell `a -> b` is before the first freeze -> after the last."""
    assert results
    rows: list[tuple[str, list[str]]] = [
        ("policy", [r.policy for r in results]),
        ("accuracy on held-out texts", [f"{r.correct / r.held_out:.3f} ({r.correct} of {r.held_out})" for r in results]),
        ("training loss, last 20 steps", [f"{r.final_loss:.4f}" for r in results]),
        ("frozen", [_frozen_in_words(r) for r in results]),
        ("time per step, median", [_pair(r.step_seconds, lambda s: f"{s * 1e3:.0f} ms") for r in results]),
        ("  steps behind that median", [_pair(r.timed_steps, lambda n: f"{n:.0f}") for r in results]),
        ("whole training", [f"{r.train_seconds:.1f} s" for r in results]),
        ("optimizer memory, this rank", [_pair(r.optimizer_bytes, _size) for r in results]),
        ("gradients reduced per step", [_pair(r.gradient_bytes, _size) for r in results]),
        ("weights gathered per step", [_pair(r.weight_bytes, _size) for r in results]),
        ("plugin's share of the time", ["-" if r.policy == "none" else f"{r.plugin_seconds / r.train_seconds:.2%}" for r in results]),
        ("pause for freezing, in all", [f"{r.pause_seconds:.2f} s" if r.frozen else "-" for r in results]),
        ("arithmetic saved, whole run", [f"{r.saved_flops_fraction:.1%}" if r.frozen else "-" for r in results]),
    ]
    widths = [max(len(name) for name, _ in rows)]
    widths += [max(len(cells[column]) for _, cells in rows) for column in range(len(results))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip([name, *cells], widths, strict=True)).rstrip() for name, cells in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * len(results)))
    for result in results:
        lines.append("")
        lines += _story(result)
    return "\n".join(lines)


def _story(result: Result) -> list[str]:
    """Which layers froze and when, in words."""
    if result.policy == "none":
        return ["none: the same training without freezing."]
    if not result.frozen:
        return [f"{result.policy}: froze nothing in {result.steps} steps, so every number above is that of an ordinary run."]
    steps: dict[int, list[str]] = {}
    for name, step in result.frozen:
        steps.setdefault(step, []).append(name)
    return [f"{result.policy}, {result.steps} steps:"] + [f"  step {step:>5}: {', '.join(names)}" for step, names in steps.items()]


if __name__ == "__main__":
    try:
        print(table([Result.load(Path(directory) / "results.json") for directory in sys.argv[1:]]))
    except ValueError as problem:
        sys.exit(str(problem))
