"""Pre-trains a small GPT without DeepSpeed while its converged layers freeze: FSDP2, or DDP or FSDP1.

    torchrun --standalone --nproc_per_node 2 launch/examples/pretrain_fsdp.py

reads the text of Python's documentation; `--data DIR` takes a folder of text files. `--ddp` and `--fsdp1` hold the same model another way.
`--resume` continues from the newest checkpoint in `--out`, and so does a run that `torchrun --max-restarts` starts again; the batches are
those of a run that never stopped. docs/pytorch.md explains each part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import bar, gpt_options, one_line_errors, parse, positive, whole
from data import BYTES, as_bytes, as_tokens, python_docs, read_folder, windows
from model import Gpt, Shape, loss_of
from table import StepLog, table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead of FSDP2")
    way.add_argument("--fsdp1", action="store_true", help="FullyShardedDataParallel instead of FSDP2")
    parser.add_argument("--config", type=Path, help="JSON with a 'smartfrz' section (default: intervals that suit --steps)")
    parser.add_argument("--policy", default="attention", help="who decides, 'manual' for no freezing (default: attention; --config wins)")
    parser.add_argument("--bf16", action="store_true", help="FSDP2: forward and backward in bf16, reductions in fp32")
    gpt_options(parser, blocks=6, width=64)
    parser.add_argument("--batch-size", type=whole(1), default=8, help="texts per rank and step (default: 8)")
    parser.add_argument("--steps", type=whole(1), default=600, help="optimizer steps (default: 600)")
    parser.add_argument("--save-every", type=whole(1), default=200, help="steps from one checkpoint to the next (default: 200)")
    parser.add_argument("--lr", type=positive, default=3e-3, help="highest learning rate (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp"), help="for checkpoints, events and results (default: runs/fsdp)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out, where there is one")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a rank that waits for another gives up (600)")
    args = parse(parser, argv)
    if args.bf16 and (args.ddp or args.fsdp1):
        parser.error("--bf16 is for FSDP2")
    return args


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The wrapped model: a unit for the embeddings and one for each block, so that each can freeze as a whole; the root has the head."""
    shape = Shape(vocabulary=BYTES, length=args.length, blocks=args.blocks, width=args.width, heads=args.heads)
    if not (args.ddp or args.fsdp1):
        with torch.device("meta"):  # no rank ever holds the whole model
            model = Gpt(shape)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.bf16 else MixedPrecisionPolicy()
        for module in (model.embeddings, *model.blocks):
            fully_shard(module, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        model.to_empty(device=device)
        model.load_initial_weights(args.seed)
        return model
    model = Gpt(shape).to(device)
    model.load_initial_weights(args.seed)
    if args.ddp:
        return DistributedDataParallel(model)

    def unit(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, use_orig_params=True, device_id=device)

    model.embeddings = unit(model.embeddings)  # type: ignore[assignment]
    for i, block in enumerate(model.blocks):
        model.blocks[i] = unit(block)
    return unit(model)


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, args: argparse.Namespace, device: torch.device) -> float:
    """Nats a byte, over 16 batches a rank; the mean of the ranks. Collective."""
    model.eval()
    total = torch.zeros((), device=device)
    for i in range(16):
        x, y = windows(tokens, rows=args.batch_size, length=args.length, draw=(0, dist.get_rank(), i))
        total += loss_of(model(x.to(device)), y.to(device)) / 16
    model.train()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


# --- checkpoints ----------------------------------------------------------------------------------------------------------------


def save(where: Path, model: nn.Module, optimizer: Any, scheduler: Any, controller: smartfrz_ds.TorchController) -> None:
    """The freeze state first: torch writes `.metadata`, by which a checkpoint counts as whole, at its end."""
    controller.save(where)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}, checkpoint_id=where)


def load(where: Path, model: nn.Module, optimizer: Any, scheduler: Any, controller: smartfrz_ds.TorchController) -> None:
    controller.restore(where)  # first: the optimizer must hold what the checkpoint's holds
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    dcp.load(state, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    scheduler.load_state_dict(state["scheduler"])


def newest(args: argparse.Namespace) -> Path | None:
    """The checkpoint to continue from.

    Raises:
        ValueError: a new run would mix its checkpoints with an old one's.
    """
    found = sorted((int(p.parent.name.removeprefix("step-")), p.parent) for p in args.out.glob("step-*/.metadata"))
    if args.resume or started_again(args.out):
        return found[-1][1] if found else None
    if found:
        raise ValueError(f"--out {args.out} holds a run that got to step {found[-1][0]}: give --resume to continue it, or another --out")
    return None


def started_again(out: Path) -> bool:
    """Whether torchrun has started this run before, and it got as far as its note; a start that was refused leaves none."""
    note = out / "run_id"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and note.is_file() and note.read_text() == os.environ.get("TORCHELASTIC_RUN_ID")


# --- the run --------------------------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    section: dict[str, Any] = {"policy": args.policy, "snapshot_interval": max(1, args.steps // 100), "window": 30}
    section |= {"freeze_interval": max(1, args.steps // 25), "warmup_steps": args.steps // 5}
    if args.config is not None:
        section |= json.loads(args.config.read_text())["smartfrz"]
    return {"total_steps": args.steps, "log_path": str(args.out / "events.jsonl")} | section


def reduced(model: nn.Module, counted: CollectiveBytes) -> int:
    """Return the bytes of gradients that this rank passed to reductions in the last backward."""
    if isinstance(model, DistributedDataParallel):  # reduces in C++, in its buckets
        return sum(int(size) for size in model._get_ddp_logging_data()["bucket_sizes"].split(","))
    return sum(size for name, size in counted.take().items() if name.startswith("reduce_scatter"))


def train(args: argparse.Namespace, device: torch.device) -> None:
    counted, rank, resumed = CollectiveBytes(), dist.get_rank(), newest(args)
    if rank == 0:
        (args.out / "run_id").write_text(os.environ.get("TORCHELASTIC_RUN_ID", ""))
    model = build(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    warm = max(1, args.steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    controller = smartfrz_ds.attach_torch(model, optimizer, settings(args), scheduler=scheduler)  # the one line
    if resumed is not None:
        load(resumed, model, optimizer, scheduler, controller)
        if rank == 0:
            print(f"continuing after step {controller.step}, frozen: {', '.join(controller.frozen) or 'nothing'}")
    texts = python_docs() if args.data is None else read_folder(args.data)
    tokens, held_out = as_tokens(texts.train, as_bytes), as_tokens(texts.held_out, as_bytes)
    last = min(args.steps, args.stop_after or args.steps)
    log, shown = StepLog(counted, first_step=controller.step + 1), bar(args.steps, done=controller.step, rank=rank)
    held = controller.report().optimizer_bytes
    while controller.step < last:
        with log.step():
            x, y = windows(tokens, rows=args.batch_size, length=args.length, draw=(1, controller.step, rank))
            loss = loss_of(model(x.to(device)), y.to(device))
            counted.take()
            with smartfrz_ds.explained(controller, "backward"):  # in the forward and in its step the controller sees to it itself
                loss.backward()
            log.backward_done(reduced=reduced(model, counted))
            controller.observe(loss=loss.item())  # for the log, and for a guard
            optimizer.step()  # the controller acts in here
            scheduler.step()
            optimizer.zero_grad()
        log.series["loss"].append(loss.item())
        held = held or controller.report().optimizer_bytes  # moments are made in the first step
        shown.set_postfix({"loss": f"{loss.item():.3f}", "frozen": f"{len(controller.frozen)}/{len(controller.layers)}"}, refresh=False)
        shown.update()
        if controller.step % args.save_every == 0 or controller.step == last:
            save(args.out / f"step-{controller.step}", model, optimizer, scheduler, controller)
    shown.close()
    now = controller.report().optimizer_bytes
    result = log.result(controller, optimizer_bytes=(held, now), scores={})
    result.scores["held-out loss (nats a byte)"] = held_out_loss(model, held_out, args, device)
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
