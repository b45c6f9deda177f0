"""Checkpoints that are loaded into a running engine, and two engines with one log. Launched by test_record.py, one launch for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from reference import oracle
from workers import ranks

import smartfrz_ds
from smartfrz_ds.telemetry.events import FreezeEvent, read_log

FRONT = ["embeddings", "blocks.0"]


def make(folder: Path, log: str = "log.jsonl") -> Any:
    config = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "smartfrz": {"policy": "manual", "log_path": str(folder / log), "status_interval": 2},
    }
    model = oracle.Net()
    return smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def train(engine: Any, first: int, last: int) -> None:
    """The steps `first` + 1 .. `last`."""
    for number in range(first, last):
        x, y = oracle.data(number, 0, dist.get_rank())
        engine.backward(oracle.loss_of(engine, x, y, "fp32"))
        engine.step()


def events(engine: Any) -> list[Any]:
    return [plain(e) for e in engine.smartfrz.report().events]


def plain(event: FreezeEvent) -> list[Any]:
    return [event.kind, event.step, event.from_step, list(event.layers), list(event.frozen), Path(event.message).name]


def logged(path: Path) -> list[Any]:
    return [plain(r) if isinstance(r, FreezeEvent) else [type(r).__name__, r.step] for r in read_log(path)]


def rollback(folder: Path) -> dict[str, Any]:
    """Freeze after step 5, back to step 4, on to step 6, weights of step 5 alone, then to step 5 and to step 4 without a step between."""
    engine, saves = make(folder), str(folder / "saves")
    train(engine, 0, 4)
    engine.save_checkpoint(saves, tag="4")
    train(engine, 4, 5)
    engine.smartfrz.freeze(FRONT)
    engine.save_checkpoint(saves, tag="5")
    train(engine, 5, 7)
    engine.load_checkpoint(saves, tag="4")
    back = {"frozen": engine.smartfrz.frozen, "step": engine.smartfrz.step}
    train(engine, 4, 6)
    engine.load_checkpoint(saves, tag="5", load_module_only=True)
    engine.load_checkpoint(saves, tag="5")
    engine.load_checkpoint(saves, tag="4")
    train(engine, 4, 5)
    dist.barrier()
    return {"back": back, "events": events(engine), "log": logged(folder / "log.jsonl"), "files": files(folder)}


def resumed(folder: Path) -> dict[str, Any]:
    """An engine goes on from step 2 after the one before it has ended at step 5, and a third one does the same. In between one only
    looks at the checkpoint."""
    saves, seen = str(folder / "saves"), {}
    engine = make(folder, "resumed.jsonl")
    train(engine, 0, 2)
    engine.save_checkpoint(saves, tag="2")
    train(engine, 2, 3)
    engine.smartfrz.freeze(FRONT)
    train(engine, 3, 5)
    engine.smartfrz.release()
    for name in ("looks", "second", "third"):
        engine = make(folder, "resumed.jsonl")
        engine.load_checkpoint(saves, tag="2")
        if name != "looks":
            train(engine, 2, 4)
        dist.barrier()
        seen[name] = {"events": events(engine), "log": logged(folder / "resumed.jsonl"), "files": files(folder)}
        engine.smartfrz.release()
    seen["copies"] = [logged(folder / name) for name in files(folder) if "cut" in name]
    return seen


def two(folder: Path) -> dict[str, Any]:
    """Two engines at once, as a GAN or an actor and a critic have them; each resumes from its own checkpoint."""
    seen: dict[str, Any] = {}
    for _ in range(2):
        engines = [make(folder), make(folder)]
        for name, engine in zip("ab", engines, strict=True):
            engine.load_checkpoint(str(folder / name))
            train(engine, engine.smartfrz.step, 3)
            engine.smartfrz.freeze(FRONT if name == "a" else FRONT[:1])
            engine.save_checkpoint(str(folder / name))
            train(engine, 3, 4)
        paths = [engine.smartfrz.report().log_path for engine in engines]
        for engine in engines:
            engine.destroy()
        dist.barrier()
        seen = {"files": files(folder), "logs": [logged(folder / name) for name in ("log.jsonl", "log.2.jsonl")], "paths": paths}
    return seen


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.jsonl"))


if __name__ == "__main__":
    with ranks.job() as (work, folder):
        for case in (rollback, resumed, two):
            with ranks.case(case.__name__):
                own = folder / case.__name__
                if dist.get_rank() == 0:
                    own.mkdir()
                dist.barrier()
                ranks.write(folder, f"{case.__name__}", case(own))
