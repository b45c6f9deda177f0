"""Measures the effect of `requires_grad_(False)` in the middle of a DeepSpeed run, compared with smartfrz_ds.

    deepspeed --num_accelerators 2 launch/examples/naive_table.py

trains a small GPT, freezes its embeddings and the first half of its blocks after half of the steps in both ways, and prints a Markdown
table (docs/results.md). Every number is counted on rank 0: bytes passed to torch.distributed, bytes of live optimizer tensors, weights
compared with a copy.
"""

from __future__ import annotations

from itertools import product

import deepspeed
import torch
import torch.distributed as dist
from data import as_tokens, read_texts, windows
from model import Gpt, Shape, loss_of
from table import gathered_bytes, optimizer_bytes

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes

SHAPE, STEPS = Shape(blocks=8, width=128, length=16), 10
FROZEN = ["embeddings", *(f"blocks.{i}" for i in range(SHAPE.blocks // 2))]
HEADER = (
    "| ZeRO stage | dtype | way of freezing half of the layers | largest movement of a frozen weight | optimizer MB on a rank "
    "| MB of gradients reduced per step | MB of weights gathered per step |\n| --- | --- | --- | --- | --- | --- | --- |"
)


def line(stage: int, dtype: str, way: str, counted: CollectiveBytes) -> str:
    """Trains STEPS steps, freezes half of the layers in the middle, and gives the table's line. Collective."""
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": 1000000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bf16"},
        "smartfrz": {"policy": "manual"},
    }
    torch.manual_seed(0)
    net = Gpt(SHAPE)
    frozen = [p for name in FROZEN for p in net.get_submodule(name).parameters()]
    start = smartfrz_ds.initialize if way == "smartfrz_ds" else deepspeed.initialize
    engine, *_ = start(model=net, model_parameters=list(net.parameters()), config=config)
    tokens = as_tokens(read_texts(None).train)

    def train(steps: range) -> tuple[int, int, int]:
        """Return the bytes of the optimizer, and the bytes that the last step reduced and gathered."""
        for step in steps:
            x, y = windows(tokens, rows=8, length=SHAPE.length, draw=(step, dist.get_rank()))
            counted.take()
            engine.backward(loss_of(engine(x.to(engine.device)), y.to(engine.device)))
            reduced = sum(counted.take().values())
            engine.step()
        return optimizer_bytes(engine), reduced, gathered_bytes(counted)

    before = train(range(1, STEPS // 2 + 1))
    if way == "smartfrz_ds":
        engine.smartfrz.freeze(FROZEN)
    else:
        for parameter in frozen:
            parameter.requires_grad_(False)
    kept = [parameter.detach().clone() for parameter in frozen]
    after = train(range(STEPS // 2 + 1, STEPS + 1))
    moved = max(float((now.detach() - then).abs().max()) for now, then in zip(frozen, kept, strict=True))
    engine.destroy()
    optimizer, *sent = (f"{a / 1e6:.2f} → {b / 1e6:.2f}" if a or b else "none" for a, b in zip(before, after, strict=True))
    cells = [str(stage), dtype, f"`{way}`", f"**{moved:.1e}**" if moved else "0", f"{optimizer} ({1 - after[0] / before[0]:.0%} freed)"]
    return f"| {' | '.join([*cells, *sent])} |"


if __name__ == "__main__":
    counted = CollectiveBytes()  # before init_distributed: DeepSpeed's backend keeps the functions that it finds then
    deepspeed.init_distributed(verbose=False)
    cells = product((0, 1, 2), ("fp32", "bf16"), ("requires_grad_(False)", "smartfrz_ds"))
    lines = [line(*cell, counted) for cell in cells]
    if dist.get_rank() == 0:
        print("\n".join([HEADER, *lines]), flush=True)
    dist.barrier()
    dist.destroy_process_group()
