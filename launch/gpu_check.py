"""One check of launch/gpu_check.sh, on every rank: freezing on this machine's accelerators. Prints one row of its table on rank 0.

    deepspeed --num_accelerators 2 launch/gpu_check.py zero 2 [--dtype bf16] [--offload] --out FILE
    deepspeed --num_accelerators 2 launch/gpu_check.py fsdp2 | 8bit | pipeline | profile --out FILE

More ranks than accelerators share them, over gloo.

Exact means: the freeze moves no weight, frozen weights stay as they are, and ranks hold the same, each to the last bit. The distance
from one process in plain torch is a figure (sums over ranks and fused kernels round in another order), bounded by `FAR`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import smartfrz_ds

WIDTH, BLOCKS, STEPS, BATCH = 256, 8, 8, 16
FAR = 0.2  # of each weight tensor: mean distance from plain torch, as a share of how far training moved it
FIRST = ["embeddings", "blocks.0", "blocks.1", "blocks.2"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(32, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)  # after the blocks: parameters in front of them belong to the layer "embeddings"

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def is_first(name: str) -> bool:
    return name.startswith("inp.") or ".".join(name.split(".")[:2]) in FIRST


def batch(step: int, rank: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(BATCH, 32) and (BATCH,), by step and rank alone."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(BATCH, 32, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)
    return x.to(device, dtype), y.to(device)


def loss_of(model: Any, step: int, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    x, y = batch(step, rank, device, dtype)
    return nn.functional.cross_entropy(model(x).float(), y)


def full(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights on the host, gathered where they are cut. Collective."""
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
        return {n.removeprefix("_orig_mod."): p.detach().float().cpu().clone() for n, p in whole.items()}


def plain(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the same training at its start and end, in this process alone: plain torch with fp32 masters."""
    model = Net().to(device, dtype)
    begin = full(model)
    masters = {p: p.detach().float().clone().requires_grad_() for p in model.parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-3, weight_decay=0.01)
    world = dist.get_world_size()
    for step in range(STEPS):
        optimizer.zero_grad()
        live = {n: p for n, p in model.named_parameters() if step < STEPS // 2 or not is_first(n)}
        for rank in range(world):
            grads = torch.autograd.grad(loss_of(model, step, rank, device, dtype), list(live.values()))
            for p, g in zip(live.values(), grads, strict=True):
                own = g.float() / world
                masters[p].grad = own if masters[p].grad is None else masters[p].grad + own
        optimizer.step()
        for p, master in masters.items():
            p.data.copy_(master.data)
    return begin, full(model)


def engine_of(stage: int, dtype: torch.dtype, optimizer: Any = None, *, model: Any = None, offload: bool = False) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage} | ({"offload_optimizer": {"device": "cpu", "pin_memory": True}} if offload else {}),
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "smartfrz": {"policy": "manual"},
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    if optimizer is None:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True}}
    model = model or Net()
    made = optimizer(model.parameters()) if optimizer is not None else None
    return smartfrz_ds.initialize(model=model, model_parameters=model.parameters(), optimizer=made, config=config)[0]


def train(engine: Any, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step, dist.get_rank(), engine.device, dtype))
        engine.step()


def peak() -> tuple[float, float]:
    """MB that tensors, and the allocator, hold at most since the last call; 0 on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return 0.0, 0.0
    most = accelerator.max_memory_allocated() / 1e6, accelerator.max_memory_reserved() / 1e6
    accelerator.reset_peak_memory_stats()
    return most


def judge(before: dict[str, Tensor], after: dict[str, Tensor], end: dict[str, Tensor]) -> str:
    """The row's text; raises AssertionError where what must be exact is not."""
    froze = max((before[n] - after[n]).abs().max().item() for n in before)
    moved = max((after[n] - end[n]).abs().max().item() for n in end if is_first(n))
    trained = max((after[n] - end[n]).abs().max().item() for n in end if not is_first(n))
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, [float(w.double().sum()) for w in end.values()])
    assert froze == 0.0, f"the freeze moved weights by {froze}"
    assert moved == 0.0, f"frozen weights moved by {moved}"
    assert trained > 0.0, "nothing trained after the freeze"
    assert all(d == digests[0] for d in digests), "the ranks hold different weights"
    return "exact"


def distance(end: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> str:
    """The largest distance of a weight from plain torch; raises AssertionError where a tensor was trained otherwise."""
    begin, expected = plain(dtype, device)
    for n, weight in end.items():
        away, moved = (weight - expected[n]).abs().mean().item(), (expected[n] - begin[n]).abs().mean().item()
        assert away <= FAR * moved, f"{n} is {away:.1e} from plain torch on average, and moved by {moved:.1e}"
    return f"from plain torch {max((end[n] - expected[n]).abs().max().item() for n in end):.1e}"


def zero(stage: int, dtype: torch.dtype, offload: bool) -> str:
    engine = engine_of(stage, dtype, offload=offload)
    train(engine, range(STEPS // 2), dtype)
    before, controller = full(engine.module), engine.smartfrz
    need = controller.backend.memory_need([p for n, p in engine.module.named_parameters() if is_first(n)], (), keep=False).device / 1e6
    peak()
    level, reserved = peak()
    began, held = time.perf_counter(), controller.report().optimizer_bytes
    controller.freeze(FIRST)
    get_accelerator().synchronize()
    pause, (most, most_reserved) = time.perf_counter() - began, peak()
    after, left = full(engine.module), controller.report().optimizer_bytes
    train(engine, range(STEPS // 2, STEPS), dtype)
    end = full(engine.module)
    text = f"{judge(before, after, end)}, {distance(end, dtype, engine.device)}"
    assert left < held, "no optimizer memory was released"
    # the allocator rounds each tensor up to 512 bytes
    assert most <= level + need + 1, f"the freeze held {most - level:.1f} MB above the level before, by the formula {need:.1f} MB"
    return (
        f"{text}; optimizer {held / 1e6:.1f} -> {left / 1e6:.1f} MB; the freeze held {most - level:.1f} MB more (allowed {need:.1f}), "
        f"reserved {reserved:.0f} -> {most_reserved:.0f} MB; {pause:.3f} s"
    )


def pipeline(dtype: torch.dtype) -> str:
    """The clock of a pipeline's entries, with the accelerator's events."""
    torch.manual_seed(0)
    entries = [nn.Linear(32, WIDTH), *(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, 10)]
    module = PipelineModule(entries, num_stages=dist.get_world_size(), loss_fn=nn.CrossEntropyLoss(), partition_method="uniform")
    engine = engine_of(0, torch.float32, model=module)
    engine.smartfrz.backend.time_entries()
    clock = engine.smartfrz.backend.clock  # it stops once the costs after the freeze are known
    began = time.perf_counter()
    for step in range(6):
        if step == 3:
            engine.smartfrz.freeze(list(engine.smartfrz.layers)[:2])
        engine.train_batch(iter([batch(step, 0, engine.device, torch.float32)]))
    seconds = time.perf_counter() - began
    times = clock.times()
    forwards = [entry.forward for entry in times.values()]
    assert all(f is not None and 0 < f < seconds for f in forwards), f"forwards of {forwards} s in {seconds} s"
    return f"{len(times)} entries here, forward {min(forwards) * 1e6:.0f} to {max(forwards) * 1e6:.0f} microseconds"


def fsdp2(dtype: torch.dtype) -> str:
    """Fused AdamW where there is a GPU, each block compiled."""
    device = torch.device(get_accelerator().current_device_name())
    fused = device.type != "cpu"
    model = Net().to(device)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = fully_shard(torch.compile(block) if fused else block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "keep_state": 100})

    def steps(numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            loss_of(model, step, dist.get_rank(), device, torch.float32).backward()
            optimizer.step()

    steps(range(STEPS // 2))
    before, held = full(model), controller.report().optimizer_bytes
    controller.freeze(FIRST)
    after, left = full(model), controller.report().optimizer_bytes
    steps(range(STEPS // 2, STEPS))
    text = judge(*({n.replace("_orig_mod.", ""): w for n, w in x.items()} for x in (before, after, full(model))))
    controller.thaw(FIRST)  # kept moments and their step counts go back to where the fused kernel wants them
    steps(range(STEPS, STEPS + 2))
    return f"{text}; optimizer {held / 1e6:.1f} -> {left / 1e6:.1f} MB; thawed with kept state"


def eight_bit(dtype: torch.dtype) -> str:
    try:
        import bitsandbytes
    except ImportError:
        return "left out: bitsandbytes is not installed"
    engine = engine_of(2, dtype, lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-3, min_8bit_size=64))
    train(engine, range(2), dtype)
    try:
        engine.smartfrz.freeze(FIRST)
    except ValueError as error:
        train(engine, range(2, 4), dtype)
        return f"refused under ZeRO-2 as designed, training went on: {str(error)[:60]}…"
    raise AssertionError("AdamW8bit under ZeRO-2 was not refused")


def profile(dtype: torch.dtype, out: Path) -> str:
    """A step, a freeze and a step after it; the operations by time go into a file."""
    engine = engine_of(2, dtype)
    train(engine, range(3), dtype)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if get_accelerator().device_name() == "cuda" else []
    with torch.profiler.profile(activities=kinds) as seen:
        train(engine, range(3, 4), dtype)
        engine.smartfrz.freeze(FIRST)
        train(engine, range(4, 5), dtype)
    if dist.get_rank() == 0:
        by = "cuda_time_total" if len(kinds) > 1 else "cpu_time_total"
        out.with_suffix(".profile.txt").write_text(seen.key_averages().table(sort_by=by, row_limit=40))
    return f"operations by time: {out.with_suffix('.profile.txt').name}"


def row(args: argparse.Namespace) -> str:
    """Run a check on every rank. Returns its row of the table."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    checks = {"fsdp2": fsdp2, "8bit": eight_bit, "pipeline": pipeline, "profile": lambda dtype: profile(dtype, args.out)}
    text = zero(args.stage, dtype, args.offload) if args.check == "zero" else checks[args.check](dtype)
    name = f"ZeRO-{args.stage} {args.dtype}{' offloaded' * args.offload}" if args.check == "zero" else args.check
    return f"| {name}, {dist.get_world_size()} x {get_accelerator().device_name()} over {dist.get_backend()} | {text} |\n"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["zero", "fsdp2", "8bit", "pipeline", "profile"])
    parser.add_argument("stage", type=int, nargs="?", default=2, choices=range(4), help="of zero (default: 2)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of DeepSpeed's weights (default: fp32)")
    parser.add_argument("--offload", action="store_true", help="of zero: the optimizer in page-locked host memory")
    parser.add_argument("--out", type=Path, required=True, help="the row is appended to this file")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_args(words)


def main() -> None:
    args, accelerator, local = arguments(), get_accelerator(), int(os.environ["LOCAL_RANK"])
    on_cpu = accelerator.device_name() == "cpu"
    shared = not on_cpu and accelerator.device_count() < int(os.environ["WORLD_SIZE"])
    if shared:  # NCCL refuses two ranks on one device
        local %= accelerator.device_count()
        os.environ["LOCAL_RANK"] = str(local)
    if not on_cpu:
        accelerator.set_device(local)
    deepspeed.init_distributed("gloo" if shared else None, timeout=timedelta(seconds=90), verbose=False)
    text = row(args)
    if dist.get_rank() == 0:
        with args.out.open("a") as file:
            file.write(text)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
