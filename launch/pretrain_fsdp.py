"""Pre-trains a small GPT without DeepSpeed while its converged layers freeze: FSDP2, or DDP or FSDP1.

    torchrun --standalone --nproc_per_node 2 launch/pretrain_fsdp.py

reads the text of Python's documentation, which comes with Python. `--ddp` and `--fsdp1` hold the same model another way. `--resume` goes on
from the newest checkpoint in `--out`, and so does a run that `torchrun --max-restarts` starts again; the batches are those of a run that
never stopped. docs/pytorch.md says what happens in here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes
from smartfrz_ds.distributed.failures import explained

BYTES = 256  # the vocabulary: a byte is a token


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead of FSDP2")
    way.add_argument("--fsdp1", action="store_true", help="FullyShardedDataParallel instead of FSDP2")
    parser.add_argument("--config", type=Path, help="JSON with a 'smartfrz' section (default: intervals that suit --steps)")
    parser.add_argument("--policy", default="attention", help="who decides, 'manual' for no freezing (default: attention; --config wins)")
    parser.add_argument("--bf16", action="store_true", help="FSDP2: forward and backward in bf16, reductions in fp32")
    for name, default, text in (
        ("blocks", 6, ""),
        ("width", 64, ""),
        ("heads", 4, "heads of attention"),
        ("length", 64, "bytes of a text that are read at once"),
        ("batch-size", 8, "texts per rank and step"),
        ("steps", 600, "optimizer steps"),
        ("save-every", 200, "steps from one checkpoint to the next"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})".strip())
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: 0.003)")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="save a checkpoint at this step and end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp"), help="for checkpoints, events and results (default: runs/fsdp)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, where there is one")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a rank that waits for another gives up (600)")
    args = parser.parse_args(argv)
    for name in ("blocks", "width", "heads", "length", "batch_size", "steps", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed is a whole number of at least 1")
    if args.width % args.heads:
        parser.error(f"--width {args.width} --heads {args.heads}: allowed is a width that the number of heads divides")
    if args.bf16 and (args.ddp or args.fsdp1):
        parser.error("--bf16 is for FSDP2")
    return args


# --- the model ------------------------------------------------------------------------------------------------------------------


class Embeddings(nn.Module):
    """(batch, length) int64 to (batch, length, width): what a byte is plus where it stands."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Embedding(length, width)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.bytes(x) + self.places(torch.arange(x.shape[1], device=x.device))


class Block(nn.Module):
    """Causal attention and a network of one hidden layer, each behind a norm: (batch, length, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Logits of the next byte: (batch, length) int64 to (batch, length, 256)."""

    def __init__(self, *, blocks: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def wrapped(model: Gpt, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A unit for the embeddings and one for each block, so that each can freeze as a whole; the root has the head."""
    model = model.to(device)
    if args.ddp:
        return DistributedDataParallel(model)
    if args.fsdp1:

        def unit(module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(module, use_orig_params=True, device_id=device)

        model.embeddings = unit(model.embeddings)  # type: ignore[assignment]
        for i, block in enumerate(model.blocks):
            model.blocks[i] = unit(block)
        return unit(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.bf16 else MixedPrecisionPolicy()
    for module in (model.embeddings, *model.blocks):
        fully_shard(module, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


# --- the text -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """train, held_out: bytes, (n,) int64."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of_python(cls) -> Text:
        """The reference of the language; the last tenth of it is held out."""
        data = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.int64)
        cut = len(data) * 9 // 10
        return cls(data[:cut], data[cut:])


def batch(data: Tensor, *, rows: int, length: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (rows, length) int64 each; the same for the same seed."""
    begins = torch.randint(0, len(data) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    cut = torch.stack([data[i : i + length + 1] for i in begins.tolist()]).to(device)
    return cut[:, :-1], cut[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text, args: argparse.Namespace, device: torch.device) -> float:
    """Nats a byte, over 16 batches a rank; the mean of the ranks."""
    model.eval()
    rank, total = dist.get_rank(), torch.zeros((), device=device)
    for i in range(16):
        x, y = batch(text.held_out, rows=args.batch_size, length=args.length, seed=10**9 + 16 * rank + i, device=device)
        total += loss_of(model, x, y) / 16
    model.train()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


# --- checkpoints ----------------------------------------------------------------------------------------------------------------


def save(where: Path, model: nn.Module, optimizer: torch.optim.Optimizer, controller: smartfrz_ds.TorchController) -> None:
    """The freeze state first: torch writes `.metadata`, by which a checkpoint counts as whole, at its end."""
    controller.save(where)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=where)


def load(where: Path, model: nn.Module, optimizer: torch.optim.Optimizer, controller: smartfrz_ds.TorchController) -> None:
    controller.restore(where)  # first: the optimizer must hold what the checkpoint's holds
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def newest(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from. ValueError where a new run would mix its checkpoints with an old one's."""
    found = sorted((int(p.parent.name.removeprefix("step-")), p.parent) for p in args.out.glob("step-*/.metadata"))
    if args.resume or started_again(args.out):
        return found[-1][1] if found else None
    if found:
        raise ValueError(f"--out {args.out} holds a run that got to step {found[-1][0]}: give --resume to go on with it, or another --out")
    return None


def started_again(out: Path) -> bool:
    """Whether torchrun has started this run before, and it got as far as `note_start`."""
    note = out / "run_id"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and note.is_file() and note.read_text() == os.environ.get("TORCHELASTIC_RUN_ID")


def note_start(out: Path) -> None:
    """A start that was refused leaves no note, so that the next one is refused too. Only rank 0."""
    (out / "run_id").write_text(os.environ.get("TORCHELASTIC_RUN_ID", ""))


# --- the run --------------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One value a step, of rank 0."""

    seconds: list[float] = field(default_factory=list)
    gradient_bytes: list[int] = field(default_factory=list)
    optimizer_bytes: list[int] = field(default_factory=list)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    section: dict[str, Any] = {"policy": args.policy, "snapshot_interval": max(1, args.steps // 100), "window": 30}
    section |= {"freeze_interval": max(1, args.steps // 25), "warmup_steps": args.steps // 5}
    if args.config is not None:
        section |= json.loads(args.config.read_text())["smartfrz"]
    return {"total_steps": args.steps, "log_path": str(args.out / "events.jsonl")} | section


def reduced(model: nn.Module, counted: CollectiveBytes) -> int:
    """Bytes of gradients that this rank handed to reductions in the step that has just run."""
    if isinstance(model, DistributedDataParallel):  # reduces in C++, in its buckets
        return sum(int(size) for size in model._get_ddp_logging_data()["bucket_sizes"].split(","))
    return sum(size for name, size in counted.take().items() if name.startswith("reduce_scatter"))


def train(args: argparse.Namespace, device: torch.device) -> None:
    counted, rank, resumed = CollectiveBytes(), dist.get_rank(), newest(args)
    if rank == 0:
        note_start(args.out)
    torch.manual_seed(args.seed)
    model = wrapped(Gpt(blocks=args.blocks, width=args.width, heads=args.heads, length=args.length), args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    warm = max(1, args.steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    controller = smartfrz_ds.attach_torch(model, optimizer, settings(args), scheduler=scheduler)
    text, measured = Text.of_python(), Measured()
    if resumed is not None:
        load(resumed, model, optimizer, controller)
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": controller.step, "_step_count": controller.step + 1})
        if rank == 0:
            print(f"going on after step {controller.step}, frozen: {', '.join(controller.frozen) or 'nothing'}")
    last = min(args.steps, args.stop_after or args.steps)
    seen = len(controller.report().events)
    bar = tqdm(total=args.steps, initial=controller.step, disable=rank != 0, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15.0)
    while controller.step < last:
        step, began = controller.step, time.perf_counter()
        x, y = batch(text.train, rows=args.batch_size, length=args.length, seed=(args.seed * 10**6 + step) * 1000 + rank, device=device)
        counted.take()
        loss = loss_of(model, x, y)
        with explained(controller, "backward"):  # in the forward and in its step the controller sees to it itself
            loss.backward()
        measured.gradient_bytes.append(reduced(model, counted))
        controller.observe(loss=loss.item())  # for the log, and for a guard
        optimizer.step()  # the controller acts in here
        scheduler.step()
        optimizer.zero_grad()
        measured.seconds.append(time.perf_counter() - began)
        measured.optimizer_bytes.append(controller.backend.optimizer_bytes())
        events = controller.report().events
        for event in events[seen:]:
            if rank == 0 and event.kind in ("freeze", "thaw"):
                tqdm.write(f"step {event.step}: {event.kind} {', '.join(event.layers)}")
        seen = len(events)
        bar.set_postfix({"loss": f"{loss.item():.3f}", "frozen": f"{len(controller.frozen)}/{len(controller.layers)}"}, refresh=False)
        bar.update()
        if controller.step % args.save_every == 0 or controller.step == last:
            save(args.out / f"step-{controller.step}", model, optimizer, controller)
    bar.close()
    found, weights = held_out_loss(model, text, args, device), digest(model)
    if rank == 0:
        finish(args, controller, measured, found, weights)


def digest(model: nn.Module) -> str:
    """Of all weights, on rank 0, which gets them whole. Collective."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return hashlib.sha256(b"".join(whole[name].float().numpy().tobytes() for name in sorted(whole))).hexdigest()[:16]


def finish(args: argparse.Namespace, controller: smartfrz_ds.TorchController, measured: Measured, held_out: float, weights: str) -> None:
    """Print the table and write results.json. Only rank 0."""
    report = controller.report()
    began = controller.step - len(measured.seconds)  # after a resume, what this process has seen
    freezes = [event.step for event in report.events if event.kind == "freeze"]
    first, final = min(freezes, default=None), max(freezes, default=None)
    # Steps are counted from 1; a freeze belongs to the step that it ends.
    before = slice(3, None if first is None else max(0, first - 1 - began))
    after = slice(max(0, final - began), None) if final is not None else None

    def pair(values: list[Any]) -> tuple[float | None, float | None]:
        pieces = (values[before], values[after] if after is not None else [])
        return tuple(statistics.median(piece) if piece else None for piece in pieces)  # type: ignore[return-value]

    def show(values: tuple[float | None, float | None], scale: float, unit: str) -> str:
        return (
            " -> ".join("not seen" if v is None else f"{v * scale:.2f} {unit}" for v in values) if freezes else _one(values[0], scale, unit)
        )

    rows = {
        "model held by": controller.backend.name,
        "policy": controller.config.policy,
        "frozen": ", ".join(f"{n} ({e.step})" for e in report.events if e.kind == "freeze" for n in e.layers) or "nothing",
        "held-out loss (nats a byte)": f"{held_out:.4f}",
        "training FLOPs saved": f"{100 * report.saved_flops_fraction:.1f} %",
        "median step": show(pair(measured.seconds), 1e3, "ms"),
        "gradients reduced a step": show(pair(measured.gradient_bytes), 1e-6, "MB"),
        "optimizer state on rank 0": show(pair(measured.optimizer_bytes), 1e-6, "MB"),
        "freezing itself": f"{report.plugin_seconds:.2f} s, of it {report.freeze_seconds:.2f} s in pauses",
        "digest of the weights": weights,
    }
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    results = {"step": report.step, "held_out_loss": held_out, "frozen": list(report.frozen), "weights": weights, "table": rows,
               "measured": asdict(measured)}  # fmt: skip
    (args.out / "results.json").write_text(json.dumps(results))


def _one(value: float | None, scale: float, unit: str) -> str:
    return "not seen" if value is None else f"{value * scale:.2f} {unit}"


def main() -> None:
    args = arguments()
    if "RANK" not in os.environ:
        sys.exit("pretrain_fsdp.py: start it with torchrun: torchrun --standalone --nproc_per_node 2 launch/pretrain_fsdp.py")
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=args.timeout))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        train(args, device)
    except ValueError as error:  # a user's mistake: one line says it
        if dist.get_rank() == 0:
            print(f"pretrain_fsdp.py: {error}", file=sys.stderr)
        sys.exit(2)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
