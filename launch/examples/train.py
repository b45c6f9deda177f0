"""A small run for trying out a launcher: a byte-level GPT on Python's own documentation, with layers that freeze.

    deepspeed --num_accelerators 2 launch/examples/train.py --deepspeed_config configs/zero1.json --policy linear

does what a script for many nodes should do: a time limit for every collective (`--timeout`), and with `--out DIR` a checkpoint every
`--save-every` steps, from which it continues when it is started again. The last line has a digest of the weights.
"""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from common import one_line_errors, parser_of, read_config, whole
from data import as_tokens, read_texts, windows
from model import Gpt, Shape, loss_of
from torch import nn

import smartfrz_ds


def digest(model: nn.Module) -> str:
    """Of all weights as the ranks hold them: a rank's own shard where ZeRO-3 has cut them. Collective."""
    own, every = hashlib.sha256(), [""] * dist.get_world_size()
    for param in model.parameters():
        held = param.detach()
        if hasattr(param, "ds_tensor"):  # its last shard is padded
            held = param.ds_tensor[: max(0, param.ds_numel - dist.get_rank() * param.ds_tensor.numel())]
        own.update(held.float().cpu().numpy().tobytes())
    dist.all_gather_object(every, own.hexdigest())
    return hashlib.sha256("".join(every).encode()).hexdigest()[:16]


def main() -> None:
    parser = parser_of(__doc__, out=None, steps=60, lr=1e-3)  # the JSON's are made for fine-tuning
    parser.add_argument("--save-every", type=whole(1), default=20, help="steps from one checkpoint to the next (default: 20)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a rank that waits for another one gives up (600)")
    args = parser.parse_args()
    config = read_config(args, stages=(0, 1, 2, 3))
    intervals = {"warmup_steps": args.steps // 10, "snapshot_interval": 1, "freeze_interval": max(1, args.steps // 12)}
    config["smartfrz"] = config.get("smartfrz", {"policy": "manual"}) | intervals  # that suit the length of this run
    # Finds rank and address in the environment that torchrun or the deepspeed launcher made, or else asks MPI for them.
    port = int(os.environ.get("MASTER_PORT", 29500))  # under plain mpirun, which sets none, two jobs on a host need two
    deepspeed.init_distributed(timeout=timedelta(seconds=args.timeout), distributed_port=port, verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    model = Gpt(Shape(length=32))
    engine, *_ = smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    if args.out is not None:
        engine.load_checkpoint(str(args.out))
    tokens, rows = as_tokens(read_texts(None).train), engine.train_micro_batch_size_per_gpu()
    controller, first, loss = engine.smartfrz, engine.smartfrz.step, float("nan")
    for step in range(first, args.steps):
        x, y = windows(tokens, rows=rows, length=32, draw=(step, rank))  # a resumed run reads what it would have read
        out = loss_of(engine(x.to(engine.device)), y.to(engine.device))
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
    with one_line_errors():
        main()
