"""A small run for trying out a launcher: a byte-level language model on Python's own documentation, with layers that freeze.

    deepspeed --num_accelerators 2 launch/train.py --deepspeed_config configs/zero1.json --policy linear

It needs no data but Python's. What it does is what a script for many nodes should do: a time limit for every collective (`--timeout`),
and with `--out DIR` a checkpoint every `--save-every` steps, from which it goes on when it is started again. The last line has a digest of
the weights: the same under every launcher with the same number of ranks. docs/launching.md has the commands.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import smartfrz_ds

CONTEXT = 16  # bytes that are read to guess the next one


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class NextByte(nn.Module):
    """(batch, CONTEXT) int64 -> (batch, 256) fp32, the logits of the byte that follows."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width // CONTEXT)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed JSON with a 'smartfrz' section")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")
    parser.add_argument("--policy", help="who decides (default: as in the JSON)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the whole run")
    parser.add_argument("--width", type=int, default=128, help=f"of the model, a multiple of {CONTEXT}")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--out", type=Path, help="directory for checkpoints, seen by all nodes; what lies there is resumed")
    parser.add_argument("--save-every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a rank that waits for another one gives up")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON, with the length of this run."""
    config: dict[str, Any] = json.loads(args.deepspeed_config.read_text())
    config["optimizer"]["params"]["lr"] = config["scheduler"]["params"]["warmup_max_lr"] = 1e-3  # the JSON's is made for fine-tuning
    config["scheduler"]["params"] |= {"total_num_steps": args.steps, "warmup_num_steps": max(1, args.steps // 10)}
    section = config.setdefault("smartfrz", {})
    section |= {"warmup_steps": args.steps // 10, "snapshot_interval": 1, "freeze_interval": max(1, args.steps // 12)}
    if args.policy is not None:
        section["policy"] = args.policy
    return config


def batch(corpus: Tensor, step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """(size, CONTEXT) and (size,) int64; depends on step and rank alone, so that a resumed run reads what it would have read."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    start = torch.randint(len(corpus) - CONTEXT - 1, (size, 1), generator=generator)
    windows = corpus[start + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def digest(model: nn.Module) -> str:
    """Of all weights, gathered where ZeRO-3 has cut them. Collective."""
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        data = b"".join(p.detach().float().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> None:
    args = arguments()
    # Finds rank and address in the environment that torchrun or the deepspeed launcher made, or else asks MPI for them.
    port = int(os.environ.get("MASTER_PORT", 29500))  # under plain mpirun, which sets none, two jobs on a host need two
    deepspeed.init_distributed(timeout=timedelta(seconds=args.timeout), distributed_port=port, verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = NextByte(args.width, args.blocks)
    engine, *_ = smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=settings(args))
    if args.out is not None:
        engine.load_checkpoint(str(args.out))
    corpus = torch.tensor(list("".join(topics[key] for key in sorted(topics)).encode()))
    controller, first, loss = engine.smartfrz, engine.smartfrz.step, float("nan")
    for step in range(first, args.steps):
        x, y = batch(corpus, step, rank, engine.train_micro_batch_size_per_gpu())
        out = nn.functional.cross_entropy(engine(x.to(engine.device)), y.to(engine.device))
        engine.backward(out)
        engine.step()
        loss = out.item()
        if args.out is not None and (step + 1) % args.save_every == 0:
            engine.save_checkpoint(str(args.out))
    seen = digest(engine.module)
    if rank == 0:
        frozen = f"{len(controller.frozen)} of {len(controller.layers)}"
        print(f"{world} ranks: steps {first}..{args.steps}, loss {loss:.4f}, frozen {frozen}, weights {seen}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
