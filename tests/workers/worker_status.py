"""What the log's status lines say, beside what the ranks really did. Launched by test_status.py, one launch for all engines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from workers import ranks

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes

ENGINES: dict[str, dict[str, Any]] = {
    "z0-fp32": {"zero_optimization": {"stage": 0}},
    "z1-fp32": {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2},
    "z1-bf16opt": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "z2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_accumulation_steps": 2},
    "z3-fp32": {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 2},
}
FREEZE_AT, STEPS = 5, 9
HALF = ["embeddings", "blocks.0", "blocks.1"]


def make(name: str, folder: Path, *, monitor: bool = True, **settings: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "torch_adam": True}},
        "csv_monitor": {"enabled": monitor, "output_path": str(folder), "job_name": f"csv-{name}"},
        "smartfrz": {"policy": "manual", "log_path": str(folder / f"{name}.jsonl"), "status_interval": 3} | settings,
    } | ENGINES[name]
    model = oracle.Net()
    return smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def step(engine: Any, number: int) -> tuple[list[float], int, float]:
    """Losses, bytes handed to reductions, seconds."""
    began, losses, reduced = time.perf_counter(), [], 0
    for micro in range(engine.gradient_accumulation_steps()):
        x, y = oracle.data(number, micro, dist.get_rank())
        loss = oracle.loss_of(engine, x, y, "bf16" if engine.bfloat16_enabled() else "fp32")
        WIRE.take()
        engine.backward(loss)
        reduced += sum(count for name, count in WIRE.take().items() if "reduce" in name)
        engine.step()
        losses.append(float(loss.detach()))
    return losses, reduced, time.perf_counter() - began


def both(number: float) -> float:
    tensor = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    """What really happened, one entry for each status."""
    engine = make(name, folder)
    seen: list[dict[str, Any]] = []
    losses: list[float] = []
    seconds: list[float] = []
    for number in range(STEPS):
        if number == FREEZE_AT:
            engine.smartfrz.freeze(HALF)
        time.sleep(0.02)  # the data's time belongs to a step
        micro, reduced, took = step(engine, number)
        losses += micro
        seconds.append(took + 0.02)
        if (number + 1) % 3 == 0:
            active = engine.smartfrz.report()
            mean = both(sum(losses)) / both(len(losses))
            seen.append({"loss": mean, "reduced": both(reduced), "held": both(active.optimizer_bytes), "seconds": sorted(seconds)})
            losses, seconds = [], []
    return seen


def resumed(folder: Path) -> None:
    """Seven steps, a checkpoint after the fourth and a freeze after the sixth; then a new engine goes on from the checkpoint to step 8."""
    engine = make("z1-fp32", folder, log_path=str(folder / "resumed.jsonl"), status_interval=2)
    for number in range(7):
        if number == 6:
            engine.smartfrz.freeze(HALF)
        step(engine, number)
        if number == 3:
            engine.save_checkpoint(str(folder / "checkpoint"))
    dist.barrier()
    engine.smartfrz.release()  # as the end of its process does: else the second engine gets a log of its own
    again = make("z1-fp32", folder, log_path=str(folder / "resumed.jsonl"), status_interval=2)
    again.load_checkpoint(str(folder / "checkpoint"))
    for number in range(4, 8):
        step(again, number)


def quiet(folder: Path) -> list[dict[str, int]]:
    """The bytes of a whole step with a status after each, where nobody has a log or a monitor; and where it would be due never."""
    counts = []
    for interval in (1, 10**6):
        engine = make("z1-fp32", folder, log_path=None, status_interval=interval, monitor=False)
        step(engine, 0)
        WIRE.take()
        x, y = oracle.data(1, 0, dist.get_rank())
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(oracle.loss_of(engine, x, y, "fp32"))
            engine.step()
        counts.append(WIRE.take())
    return counts


if __name__ == "__main__":
    WIRE = CollectiveBytes()
    with ranks.job() as (work, folder):
        for name in ENGINES:
            with ranks.case(name):
                ranks.write(folder, name, run(name, folder))
        with ranks.case("resumed"):
            resumed(folder)
        with ranks.case("quiet"):
            ranks.write(folder, "quiet", quiet(folder))
