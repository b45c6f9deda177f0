"""What the processes of a self-check run: `python -m smartfrz_ds.integrations.selfcheck.toy FOLDER RANK`.

FOLDER has case.json and gets result.json, or the error of a rank. Where the engine with frozen layers differs from plain torch in a bit,
the engine with nothing frozen is asked too: with frozen layers it must be no further from plain torch than twice that.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .case import Case
from .plain import FROZEN, PLAN, SAVED, STEPS, WORLD, Plan, Trajectory, frozen_elements, train_plainly

#: Difference from plain torch beyond which even the engine with nothing frozen says nothing about freezing.
_USELESS = {False: 1e-3, True: 5e-2}  # by bf16; a step moves a weight by about 1e-2


class Toy(Protocol):
    """An engine with the toy; see engines.py and wrappers.py."""

    def train(self, step: int) -> None:
        """Do one step."""
        ...

    def change(self, action: str, layers: Any) -> None:
        """Freeze or thaw layers."""
        ...

    def weights(self) -> Tensor:
        """Return all weights."""
        ...

    def optimizer_bytes(self) -> int:
        """Return the bytes of optimizer state on this rank."""
        ...

    def save(self, folder: Path) -> None:
        """Save a checkpoint."""
        ...

    def load(self, folder: Path) -> None:
        """Load it."""
        ...

    def close(self) -> None:
        """Let the engine go."""
        ...


def check(case: Case, folder: Path) -> list[str]:
    """Check one kind of engine. Collective.

    Args:
        case: The kind of engine.
        folder: For checkpoints.

    Returns:
        What is wrong; empty if nothing is.
    """
    wrong = []
    first = made(case)
    frozen, sizes = run(first, PLAN, 0, save=folder / "frozen")
    first.close()
    if frozen.frozen_moved:
        wrong.append(f"frozen weights moved, by up to {frozen.frozen_moved:.1e}")
    before, after = _summed(sizes)
    if not after < before:
        wrong.append(f"a freeze released no optimizer memory ({before} bytes before, {after} after)")
    second = made(case)
    second.load(folder / "frozen")
    resumed, _ = run(second, PLAN, SAVED)
    second.close()
    off = difference(frozen.weights, train_plainly(case, PLAN).weights)
    back = difference(resumed.weights, frozen.weights[SAVED:])
    if not off and not back:
        return wrong
    control = made(case)
    unfrozen, _ = run(control, {}, 0, save=folder / "unfrozen")
    control.close()
    own = difference(unfrozen.weights, train_plainly(case, {}).weights)
    if not own <= _USELESS[case.half]:
        return [*wrong, f"with nothing frozen, its weights differ from plain torch by {own:.1e}, so freezing cannot be checked"]
    again = made(case)
    again.load(folder / "unfrozen")
    own_back = difference(run(again, {}, SAVED)[0].weights, unfrozen.weights[SAVED:])
    again.close()
    if not off <= 2 * own:
        wrong.append(f"with layers frozen, its weights differ from plain torch by {off:.1e} (with nothing frozen: {own:.1e})")
    if not back <= 2 * own_back:
        wrong.append(f"after a load its weights differ from the run that was saved by {back:.1e} (with nothing frozen: {own_back:.1e})")
    return wrong


def made(case: Case) -> Toy:
    """Create the toy on this kind of engine. Collective."""
    if case.kind in ("deepspeed", "pipeline"):
        from .engines import EngineToy

        return EngineToy(case)
    from .wrappers import WrapperToy

    return WrapperToy(case)


def run(toy: Toy, plan: Plan, begin: int, *, save: Path | None = None) -> tuple[Trajectory, tuple[int, int]]:
    """Train from step `begin` to the end, and save before step SAVED.

    Returns:
        The trajectory, and the bytes of optimizer state before and after the first change.
    """
    history, moved, sizes = [], 0.0, (0, 0)
    held = frozen_elements(FROZEN) if begin and plan else None
    weights = toy.weights()
    for step in range(begin, STEPS):
        if step == SAVED and save is not None:
            toy.save(save)
        if step in plan:
            before = toy.optimizer_bytes()
            toy.change(*plan[step])
            sizes = sizes if any(sizes) else (before, toy.optimizer_bytes())
            held = frozen_elements([x for x in FROZEN if plan[step][0] == "freeze" or x not in plan[step][1]])
        toy.train(step)
        now = toy.weights()
        if held is not None:
            moved = max(moved, difference(now[held], weights[held]))
        history.append(now)
        weights = now
    return Trajectory(torch.stack(history), moved), sizes


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; infinity where one of them is not a number."""
    off = (one - other).abs()
    return float("inf") if off.isnan().any() else float(off.max())


def _summed(numbers: tuple[int, int]) -> list[int]:
    both = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(both)
    return [int(n) for n in both]


def _end_with_parent() -> None:
    """End this process when the run that started it has ended: a killed rank leaves no toy behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run one rank."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    _end_with_parent()
    job = json.loads((folder / "case.json").read_text())
    torch.set_num_threads(1)
    try:
        store = f"file://{folder.absolute()}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=job["seconds"]))
        case = Case.from_json(job["case"])
        if case.kind in ("deepspeed", "pipeline"):
            from .engines import prepare

            prepare()
        wrong = check(case, folder)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps({"wrong": wrong}))
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"error.{rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: threads and groups that a broken release left behind do not hold it up


if __name__ == "__main__":
    main()
