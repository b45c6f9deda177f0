"""A training script that knows nothing of smartfrz_ds. test_module.py runs it unchanged."""

import argparse

import deepspeed
import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out")
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

torch.manual_seed(0)
blocks = [torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)) for _ in range(4)]
model = torch.nn.Sequential(torch.nn.Linear(8, 16), *blocks, torch.nn.Linear(16, 2))
engine, optimizer, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
for step in range(args.steps):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
if dist.get_rank() == 0:
    torch.save({"trainable": [p.requires_grad for p in model.parameters()], "class": type(engine).__name__}, args.out)
dist.barrier()
dist.destroy_process_group()
