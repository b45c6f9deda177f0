"""Pre-trains a small GPT without DeepSpeed while its converged layers freeze: FSDP2, or DDP or FSDP1.

    torchrun --standalone --nproc_per_node 2 launch/examples/pretrain_fsdp.py

reads the text of Python's documentation; `--data DIR` takes a folder of text files. `--ddp` and `--fsdp1` hold the same model another way.
`--resume` continues from the newest checkpoint in `--out`, and so does a run that `torchrun --max-restarts` starts again; the batches are
those of a run that never stopped. docs/pytorch.md explains each part.
"""

from __future__ import annotations

import argparse
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import gpt_parser, one_line_errors, whole
from data import as_tokens, read_texts, windows
from model import Gpt, Shape, loss_of
from table import StepLog, table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import smartfrz_ds


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    defaults = {"policy": "attention", "steps": 600, "lr": 3e-3, "out": Path("runs/fsdp")}
    parser = gpt_parser(__doc__, blocks=6, width=64, deepspeed=False, **defaults)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead of FSDP2")
    way.add_argument("--fsdp1", action="store_true", help="FullyShardedDataParallel instead of FSDP2")
    way.add_argument("--bf16", action="store_true", help="FSDP2 with forward and backward in bf16, reductions in fp32")
    parser.add_argument("--batch-size", type=whole(1), default=8, help="texts per rank and step (default: 8)")
    parser.add_argument("--save-every", type=whole(1), default=200, help="steps from one checkpoint to the next (default: 200)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out, where there is one")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a rank that waits for another gives up (600)")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return the wrapped model: a unit for the embeddings and one for each block, each of which can freeze; the root has the head."""
    with torch.device(device if args.ddp or args.fsdp1 else "meta"):  # under FSDP2 no rank ever holds the whole model
        model = Gpt(Shape(length=args.length, blocks=args.blocks, width=args.width))
    if args.ddp or args.fsdp1:
        model.load_initial_weights(args.seed)
    if args.ddp:
        return DistributedDataParallel(model)
    if args.fsdp1:
        units = {"use_orig_params": True, "device_id": device}
        model.embeddings = FullyShardedDataParallel(model.embeddings, **units)  # type: ignore[assignment]
        for i, block in enumerate(model.blocks):
            model.blocks[i] = FullyShardedDataParallel(block, **units)
        return FullyShardedDataParallel(model, **units)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.bf16 else MixedPrecisionPolicy()
    for module in (model.embeddings, *model.blocks, model):
        fully_shard(module, mp_policy=policy)
    model.to_empty(device=device)
    model.load_initial_weights(args.seed)
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, args: argparse.Namespace, device: torch.device) -> float:
    """Return nats a byte, over 16 batches a rank; the mean of the ranks. Collective."""
    model.eval()
    total = torch.zeros((), device=device)
    for i in range(16):
        x, y = windows(tokens, rows=args.batch_size, length=args.length, draw=(0, dist.get_rank(), i))
        total += loss_of(model(x.to(device)), y.to(device)) / 16
    model.train()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def state_of(model: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}


def load(where: Path, model: nn.Module, optimizer: Any, scheduler: Any, controller: smartfrz_ds.TorchController) -> None:
    controller.restore(where)  # first: the optimizer must hold what the checkpoint's holds
    state = state_of(model, optimizer, scheduler)
    dcp.load(state, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def newest(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to continue from.

    Raises:
        ValueError: A new run would mix its checkpoints with those of an old one.
    """
    found = sorted((int(p.parent.name.removeprefix("step-")), p.parent) for p in args.out.glob("step-*/.metadata"))
    # Whether torchrun has started this very run before: a start that was refused left no note.
    note, again = args.out / "run_id", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    again = again and note.is_file() and note.read_text() == os.environ.get("TORCHELASTIC_RUN_ID")
    if found and not (args.resume or again):
        raise ValueError(f"--out {args.out} holds a run that got to step {found[-1][0]}: give --resume to continue it, or another --out")
    return found[-1][1] if found else None


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, resumed = dist.get_rank(), newest(args)
    dist.barrier()  # all ranks have read the note before it is written again
    if rank == 0:
        (args.out / "run_id").write_text(os.environ.get("TORCHELASTIC_RUN_ID", ""))
    texts = read_texts(args.data)
    tokens, held_out = as_tokens(texts.train), as_tokens(texts.held_out)
    model = build(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    warm = max(1, args.steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
    )
    settings = {
        "policy": "manual" if args.policy == "none" else args.policy,
        "total_steps": args.steps,
        "warmup_steps": args.steps // 5,
        "snapshot_interval": max(1, args.steps // 100),
        "freeze_interval": max(1, args.steps // 25),
        "log_path": str(args.out / "events.jsonl"),
    }
    controller = smartfrz_ds.attach_torch(model, optimizer, settings, scheduler=scheduler)  # the one line
    if resumed is not None:
        load(resumed, model, optimizer, scheduler, controller)
        if rank == 0:
            print(f"continuing after step {controller.step}, frozen: {', '.join(controller.frozen) or 'nothing'}")
    last = min(args.steps, args.stop_after or args.steps)
    log = StepLog(range(controller.step + 1, last + 1), controller, memory=lambda: controller.report().optimizer_bytes)
    for step in log.steps:
        with log.step() as seen:
            x, y = windows(tokens, rows=args.batch_size, length=args.length, draw=(1, step, rank))
            loss = loss_of(model(x.to(device)), y.to(device))
            with smartfrz_ds.explained(controller, "backward"):  # in the forward and in its step the controller sees to it itself
                loss.backward()
            seen["loss"] = loss.item()
            controller.observe(loss=seen["loss"])  # for the log, and for a guard
            optimizer.step()  # the controller acts in here
            scheduler.step()
            optimizer.zero_grad()
        if step % args.save_every == 0 or step == last:
            controller.save(args.out / f"step-{step}")  # first: torch's `.metadata`, by which a checkpoint counts as whole, comes last
            dcp.save(state_of(model, optimizer, scheduler), checkpoint_id=args.out / f"step-{step}")
    result = log.result(scores={"held-out loss (nats a byte)": held_out_loss(model, held_out, args, device)})
    if rank == 0:
        result.save(args.out / "results.json")
        print(f"\nmodel held by {controller.backend.name}\n{table([result])}\n\nresults, events and checkpoints: {args.out}")


def main() -> None:
    args = arguments()
    if "RANK" not in os.environ:
        raise ValueError("start it with torchrun: torchrun --standalone --nproc_per_node 2 launch/examples/pretrain_fsdp.py")
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=args.timeout))
    args.out.mkdir(parents=True, exist_ok=True)
    train(args, device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_line_errors():
        main()
