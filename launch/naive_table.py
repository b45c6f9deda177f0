"""What `requires_grad_(False)` does in the middle of a DeepSpeed run, measured, and what smartfrz_ds does in its place.

    deepspeed --num_accelerators 2 launch/naive_table.py

trains a small network on random data, freezes the first half of it after half of the steps in both ways, and prints a Markdown table
(that of the README). Every number is counted on rank 0: bytes handed to torch.distributed, bytes of live optimizer tensors, weights
compared with a copy.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from counting import CollectiveBytes, optimizer_bytes
from torch import Tensor, nn

import smartfrz_ds

WIDTH, BLOCKS, STEPS = 256, 8, 10
ENGINES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]
Way = Literal["requires_grad_(False)", "smartfrz_ds"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> the same
        return x + torch.relu(self.linear(self.norm(x)))


class Net(nn.Module):
    """BLOCKS equal residual blocks and a head of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. movement: the largest change of a frozen weight after its freezing; the rest: bytes on rank 0 before and after."""

    movement: float
    optimizer: tuple[int, int]
    reduced: tuple[int, int]
    gathered: tuple[int, int]


def config(stage: int, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bf16"},
        "smartfrz": {"policy": "manual"},
    }


def measure(stage: int, dtype: str, way: Way, counted: CollectiveBytes) -> Row:
    """Trains STEPS steps and freezes the first half of the blocks in the middle. Collective."""
    torch.manual_seed(0)
    net = Net()
    frozen = [p for block in net.blocks[: BLOCKS // 2] for p in block.parameters()]
    start = smartfrz_ds.initialize if way == "smartfrz_ds" else deepspeed.initialize
    engine, *_ = start(model=net, model_parameters=list(net.parameters()), config=config(stage, dtype))
    dtype_of_input = next(net.parameters()).dtype
    draw = torch.Generator().manual_seed(1 + dist.get_rank())

    def step() -> tuple[int, int]:
        x = torch.randn(8, WIDTH, generator=draw).to(engine.device, dtype_of_input)
        counted.take()
        loss = (engine(x) - x.mean(dim=1, keepdim=True)).float().square().mean()
        engine.backward(loss)
        reduced = sum(counted.take().values())
        engine.step()
        return reduced, sum(size for name, size in counted.take().items() if name.startswith("all_gather"))

    for _ in range(STEPS // 2):
        before = step()
    bytes_before = optimizer_bytes(engine)
    if way == "smartfrz_ds":
        engine.smartfrz.freeze([name for name in engine.smartfrz.layers if name.startswith("blocks.")][: BLOCKS // 2])
    else:
        for parameter in frozen:
            parameter.requires_grad_(False)
    kept = [parameter.detach().clone() for parameter in frozen]
    for _ in range(STEPS // 2):
        after = step()
    row = Row(
        movement=max(float((now.detach() - then).abs().max()) for now, then in zip(frozen, kept, strict=True)),
        optimizer=(bytes_before, optimizer_bytes(engine)),
        reduced=(before[0], after[0]),
        gathered=(before[1], after[1]),
    )
    engine.destroy()
    return row


def _bytes(pair: tuple[int, int]) -> str:
    return "none" if pair == (0, 0) else f"{pair[0] / 1e6:.2f} → {pair[1] / 1e6:.2f}"


def line(stage: int, dtype: str, way: str, row: Row) -> str:
    freed = 1 - row.optimizer[1] / row.optimizer[0]
    moved = "0" if row.movement == 0 else f"**{row.movement:.1e}**"
    cells = [
        str(stage),
        dtype,
        f"`{way}`",
        moved,
        f"{_bytes(row.optimizer)} ({freed:.0%} freed)",
        _bytes(row.reduced),
        _bytes(row.gathered),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| ZeRO stage | dtype | way of freezing half of the layers | largest movement of a frozen weight | optimizer MB on a rank "
    "| MB of gradients reduced per step | MB of weights gathered per step |\n| --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.parse_args()
    counted = CollectiveBytes()  # before init_distributed: DeepSpeed's backend keeps the functions that it finds then
    deepspeed.init_distributed(verbose=False)
    ways: tuple[Way, ...] = ("requires_grad_(False)", "smartfrz_ds")
    lines = [line(stage, dtype, way, measure(stage, dtype, way, counted)) for stage, dtype in ENGINES for way in ways]
    if dist.get_rank() == 0:
        print("\n".join([HEADER, *lines]))
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
