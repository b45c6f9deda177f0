"""A small training script as a user would write it, resumed from the last checkpoint, that somebody may kill. Launched by test_chaos.py.

The job says where a rank kills itself with SIGKILL: {"rank": r, "at": place, "count": n} means at the n-th time that it gets there.
Places lie around and inside freezes, saves and steps. They wrap this process's objects and functions from outside; the package knows
nothing of them.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import engine_for, full

from smartfrz_ds.backends.deepspeed.flat import backend as flat
from smartfrz_ds.checkpoint import deepspeed as resume
from smartfrz_ds.checkpoint import files as checkpoint


class Killer:
    """Counts how often this rank passes each place, and ends it, without any clean-up, at the chosen one."""

    def __init__(self, wanted: dict[str, Any] | None) -> None:
        self.wanted = wanted if wanted and wanted["rank"] == dist.get_rank() else None
        self.seen: Counter[str] = Counter()

    def pass_by(self, place: str) -> None:
        self.seen[place] += 1
        if self.wanted and self.wanted["at"] == place and self.wanted["count"] == self.seen[place]:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, place: str) -> None:
        """Places before and after `owner.name`."""
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(f"before {place}")
            result = original(*args, **kwargs)
            self.pass_by(f"after {place}")
            return result

        setattr(owner, name, watched)


def place_hooks(killer: Killer, engine: Any) -> None:
    backend = engine.smartfrz.backend
    killer.around(backend, "check", "check of a freeze")
    killer.around(backend, "before_change", "letting go of the old layout")
    killer.around(backend, "install", "one group of the new layout")
    killer.around(flat, "move_group_state", "one group's state")
    killer.around(backend, "after_change", "the new layout's bookkeeping")
    killer.around(backend, "verify", "the check after a freeze")
    killer.around(engine, "_save_checkpoint", "model states")
    killer.around(engine, "_save_zero_checkpoint", "optimizer states")
    killer.around(engine.optimizer, "step", "the optimizer's step")
    killer.around(resume, "write_complete", "the list of files")
    write = checkpoint.write_atomically

    def half(path: Path, data: bytes) -> None:
        """The write itself, with a place where half of it is on disk."""
        killer.pass_by(f"before writing {path.name}")
        scratch = path.with_name(f".{path.name}.half")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data[: len(data) // 2])
        killer.pass_by(f"half of {path.name}")
        scratch.unlink()
        write(path, data)
        killer.pass_by(f"after writing {path.name}")

    checkpoint.write_atomically = resume.write_atomically = half
    save = torch.save

    def torn(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(state, path, *args, **kwargs)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        killer.pass_by(f"half of {'optimizer' if 'optim' in str(path) else 'model'} states")
        Path(path).write_bytes(whole)

    torch.save = torn


def main() -> None:
    with ranks.job() as (job, folder):
        cell, saves = oracle.Cell(**job["cell"]), folder / "checkpoints"
        killer = Killer(job["kill"])
        engine = engine_for(cell, oracle.Net())[0]
        engine.load_checkpoint(str(saves))
        start = engine.smartfrz.step
        place_hooks(killer, engine)
        for step in range(start, cell.steps):
            killer.pass_by("a step")
            # A run that was killed after a freeze, but before the next save, freezes again.
            if event := cell.at(step):
                getattr(engine.smartfrz, event[0])(event[1])
            x, y = oracle.data(step, 0, dist.get_rank())
            engine.backward(oracle.loss_of(engine, x, y, cell.dtype))
            engine.step()
            if (step + 1) % job["save_every"] == 0:
                engine.save_checkpoint(str(saves), tag=job["tag"])
        weights = full(engine.module)
        if dist.get_rank() == 0:
            (folder / "seen.json").write_text(json.dumps({"places": killer.seen, "start": start, "frozen": list(engine.smartfrz.frozen)}))
            save_file({n: w.contiguous() for n, w in weights.items()}, folder / "final.safetensors")


if __name__ == "__main__":
    main()
