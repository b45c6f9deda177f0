"""Measures one engine of `smartfrz bench zero`, on every rank. Arguments: ENGINE FILE SETTINGS, passed by zero.py."""

from __future__ import annotations

import gc
import itertools
import math
import time
from statistics import median
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import smartfrz_ds
from smartfrz_ds.distributed.devices import synchronize

from .launching import Settings, worker_main
from .memory import held_bytes, reset_peak
from .wire import CollectiveBytes
from .zero import ENGINES, KINDS

BLOCKS, FEATURES = 8, 64


class Block(nn.Module):
    """A residual MLP: (batch, width) to (batch, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Equal blocks that have nearly all weights. Layers: embeddings, blocks.0 .. blocks.7, head.

    Args:
        params: Approximate number of weights, >= 10**4; 37.8 million at width 768.
    """

    def __init__(self, params: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = max(16, round(math.sqrt(params / (8 * BLOCKS)) / 16) * 16)
        self.inp = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.head = nn.Linear(width, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TimedEngine:
    """One of the engines side by side: a network and its DeepSpeed engine, whose steps are timed and whose bytes are counted."""

    def __init__(self, kind: str, config: Settings, settings: Settings, wire: CollectiveBytes) -> None:
        self.wire = wire
        self.model = Net(settings["params"] * 1e6)
        if kind == "fresh":
            freeze_naively(self.model)
        full: Settings = {
            "train_micro_batch_size_per_gpu": settings["batch"],
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "torch_adam": True}},
            **config,
        }
        make = smartfrz_ds.initialize if kind == "ours" else deepspeed.initialize
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.engine: Any = make(model=self.model, model_parameters=params, config=full)[0]
        generator = torch.Generator().manual_seed(dist.get_rank())
        dtype = torch.bfloat16 if "bf16" in config else torch.float32
        self.x = torch.randn(settings["batch"], FEATURES, generator=generator).to(self.engine.device, dtype)
        self.y = torch.randint(0, FEATURES, (settings["batch"],), generator=generator).to(self.engine.device)

    def step(self) -> tuple[list[float], dict[str, dict[str, int]]]:
        """Run one step. Returns seconds (slowest rank) and bytes (this rank) of forward, backward and step."""
        dist.barrier()
        counts = {}
        self.wire.take()
        times = [self._now()]
        loss = nn.functional.cross_entropy(self.engine(self.x).float(), self.y)
        times.append(self._now())
        counts["forward"] = self.wire.take()
        self.engine.backward(loss)
        times.append(self._now())
        counts["backward"] = self.wire.take()
        self.engine.step()
        times.append(self._now())
        counts["step"] = self.wire.take()
        taken = torch.tensor([b - a for a, b in itertools.pairwise(times)], dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.tolist(), counts

    def _now(self) -> float:
        """Seconds, once all queued work is done."""
        synchronize(self.engine.device)
        return time.perf_counter()

    def warm_up(self, steps: int = 3) -> dict[str, dict[str, int]]:
        """Run a few steps. Returns the bytes of the last."""
        return [self.step() for _ in range(steps)][-1][1]


def first_freeze(ours: TimedEngine, layers: list[str]) -> dict[str, Any]:
    """Freeze for the first time. Returns its effect on memory, and the prediction."""
    controller = ours.engine.smartfrz
    predicted = controller.predict_pause(layers)
    need = controller.backend.memory_need(front_half(ours.model), (), keep=False)
    gc.collect()
    device = ours.engine.device
    before = held_bytes(device)
    reset_peak(device)
    controller.freeze(layers)
    gc.collect()
    peak, after = held_bytes(device, peak=True), held_bytes(device)
    event = controller.report().events[-1]
    seen = torch.tensor([peak - before, before - after], device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return {
        "rise": int(seen[0]),
        "fall": int(seen[1]),
        "allowed": need.host + need.device if device.type == "cpu" else need.device,
        "seconds": event.seconds,
        "moved_bytes": event.moved_bytes,
        "predicted_bytes": predicted.moved_bytes,
        "predicted_seconds": predicted.seconds,
        "cost": vars(predicted.cost),
    }


def snapshot_and_gather(ours: TimedEngine) -> dict[str, Any]:
    """Measure bytes and time of a snapshot and of gathering all parameters, alternately."""
    snapshot: list[float] = []
    gather: list[float] = []
    out: dict[str, Any] = {}
    for _ in range(7):
        for name, times in (("snapshot", snapshot), ("gather", gather)):
            dist.barrier()
            ours.wire.take()
            began = time.perf_counter()
            if name == "snapshot":
                ours.engine.smartfrz._recording.snapshots.take()
            else:
                with deepspeed.zero.GatheredParameters(list(ours.model.parameters())):
                    pass
            times.append(time.perf_counter() - began)
            out[name] = {"bytes": sum(ours.wire.take().values()), "seconds": median(times)}
    return out


def freeze_naively(model: Net) -> None:
    """Freeze the first half with requires_grad_(False)."""
    for param in front_half(model):
        param.requires_grad_(False)


def front_half(model: Net) -> list[nn.Parameter]:
    """Return the parameters of the embeddings and the first half of the blocks."""
    return [p for module in (model.inp, *model.blocks[: BLOCKS // 2]) for p in module.parameters()]


def measure(name: str, settings: Settings, wire: CollectiveBytes) -> dict[str, Any]:
    """Measure an engine with all kinds of copies. Collective."""
    config = {k: v for k, v in ENGINES[name].items() if k != "smartfrz"}
    ours = TimedEngine("ours", ENGINES[name], settings, wire)
    controller = ours.engine.smartfrz
    layers = list(controller.layers[: 1 + BLOCKS // 2])
    result: dict[str, Any] = {"engine": name, "settings": settings, "bytes": {"unfrozen": ours.warm_up()}}
    optimizer_bytes = {"unfrozen": controller.report().optimizer_bytes}
    if config["zero_optimization"]["stage"] == 3:
        result |= snapshot_and_gather(ours)
    result["freeze"] = first_freeze(ours, layers)
    optimizer_bytes["ours"] = controller.report().optimizer_bytes
    result["share"] = 1 - sum(_numel(p) for p in ours.model.parameters() if p.requires_grad) / sum(
        _numel(p) for p in ours.model.parameters()
    )
    result["bytes"]["ours"] = ours.warm_up()

    copies = {"ours": ours} | {kind: TimedEngine(kind, config, settings, wire) for kind in KINDS if kind != "ours"}
    for kind in ("unfrozen", "naive", "fresh"):
        copies[kind].warm_up()
    freeze_naively(copies["naive"].model)
    result["bytes"]["naive"] = copies["naive"].warm_up()

    result["rounds"] = []
    for number in range(settings["rounds"]):
        seconds = result["freeze"]["seconds"]
        if number:
            controller.thaw(layers)
            ours.warm_up(1)
            controller.freeze(layers)
            seconds = controller.report().events[-1].seconds
            ours.warm_up(1)
        times: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
        for turn in range(settings["steps"]):
            for shift in range(len(KINDS)):  # the order rotates
                kind = KINDS[(turn + shift) % len(KINDS)]
                times[kind].append(copies[kind].step()[0])
        # The fastest time of each phase.
        result["rounds"].append({kind: [min(t[k] for t in seen) for k in range(3)] for kind, seen in times.items()} | {"freeze": seconds})
    # Attached only now, to count the naive engine's bytes in the same way. A controller requires that its layers are trainable.
    copies["naive"].model.requires_grad_(True)
    attached: Any = smartfrz_ds.attach(copies["naive"].engine, {"policy": "manual"})
    optimizer_bytes["naive"] = attached.smartfrz.report().optimizer_bytes
    return result | {"optimizer_bytes": optimizer_bytes}


def _numel(p: nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))


def main() -> None:
    """Measure the engine of the command line."""
    wire = CollectiveBytes()
    worker_main(lambda name, settings: measure(name, settings, wire))


if __name__ == "__main__":
    main()
