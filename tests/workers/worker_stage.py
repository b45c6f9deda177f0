"""Counts what a freezing stage and a watched step cost: collectives, and copies to the host. Launched by test_stage_cost.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from torch import Tensor, nn
from workers import ranks

import smartfrz_ds

GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object")
COLLECTIVES = (*GATHERS, "all_reduce", "all_to_all_single", "broadcast", "reduce")
READS = ("cpu", "tolist", "item", "__float__", "__int__", "__bool__")


@contextmanager
def counted(seen: Counter[str]) -> Iterator[None]:
    """Count the calls of the block: each collective by its name, and tensors that are read by the host as "read"."""
    depth = [0]

    def wrap(original: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += not depth[0]
            depth[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    before = [(dist, name, getattr(dist, name), name) for name in COLLECTIVES if hasattr(dist, name)]
    before += [(Tensor, name, getattr(Tensor, name), "read") for name in READS]
    for owner, name, original, counted_as in before:
        setattr(owner, name, wrap(original, counted_as))
    try:
        yield
    finally:
        for owner, name, original, _ in before:
            setattr(owner, name, original)


def train(settings: dict[str, Any], steps: int = 12) -> dict[str, Any]:
    """Count what the controller does after each step, of a model that DDP wraps."""
    net = oracle.Net()
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"warmup_steps": 0, "cooldown": 0, "snapshot_interval": 100, "total_steps": 100,
                                                             "gradient_check": "off", **settings})  # fmt: skip
    rows = []
    original, seen = controller.after_step, Counter[str]()

    def after_step() -> None:
        with counted(seen):
            original()

    controller.after_step = after_step  # type: ignore[method-assign]
    for step in range(steps):
        optimizer.zero_grad()
        loss = oracle.loss_of(model, *oracle.data(step, 0, dist.get_rank()), "fp32")
        loss.backward()
        if "guard" in settings:
            controller.record_loss(loss)
        seen.clear()
        frozen = len(controller.frozen)
        optimizer.step()
        rows.append({"collectives": sum(v for k, v in seen.items() if k != "read"), "reads": seen["read"], "kinds": dict(seen),
                     "froze": len(controller.frozen) - frozen})  # fmt: skip
    controller.detach()
    return {"rows": rows, "frozen": list(controller.frozen)}


LINEAR = {"policy": "linear", "linear": {"start_step": 4, "end_step": 90}, "freeze_interval": 4, "snapshot_interval": 4}
CASES = {
    "stages": LINEAR,
    "snapshots": {"policy": "attention", "freeze_interval": 50, "snapshot_interval": 2},
    "guarded": {**LINEAR, "guard": {"metric": "loss", "tolerance": 1.0, "window": 3, "smoothing": 0.5}},
}


def agreements() -> dict[str, Any]:
    """Count one of each agreement, of data of several sizes."""
    from smartfrz_ds.distributed.collectives import Collectives

    both, out = Collectives(torch.device("cpu")), {}
    rank = dist.get_rank()
    actions = {
        "same": lambda: both.assert_same("text", "texts"),
        "small objects": lambda: both.gather_objects([rank] * 10),
        "large objects": lambda: both.gather_objects([rank, "x" * (5000 * (1 + rank))]),
        "small bytes": lambda: both.broadcast_bytes(b"abc" if rank == 0 else b"") .decode(),
        "large bytes": lambda: both.broadcast_bytes(b"abc" * 2000 if rank == 0 else b"other").decode(),
        "no bytes": lambda: both.broadcast_bytes(b"").decode(),
        "results": lambda: both.gather_results(lambda: ("kept", [rank + 1, 7]), 2),
        "mean of one": lambda: both.mean(torch.tensor(3.0) if rank == 1 else None),
        "mean": lambda: both.mean(torch.tensor(3.0) if rank == 1 else 2.0),
        "mean of none": lambda: both.mean(None),
        "mean of nan": lambda: math.isnan(both.mean(float("nan") if rank else torch.tensor(1.0)) or 0.0),
    }  # fmt: skip
    for name, action in actions.items():
        seen = Counter[str]()
        with counted(seen):
            result = action()
        out[name] = {"result": result, "collectives": sum(v for k, v in seen.items() if k != "read"), "reads": seen["read"]}
    return out


class Awkward(oracle.Net):
    """Fails in one of its forwards in eval mode, on rank 1: the probe's."""

    evaluations, fails_at = 0, -1

    def forward(self, *args: Any) -> Any:
        if not self.training:
            self.evaluations += 1
            if self.evaluations - 1 == self.fails_at and dist.get_rank() == 1:
                raise ValueError("this batch does not fit") if self.fails_at == 0 else RuntimeError("out of memory")
        return super().forward(*args)


def probe(fails_at: int) -> dict[str, Any]:
    """Train with a probe batch whose forward number `fails_at` fails on rank 1; number 0 is the one at the start."""
    net = Awkward()
    net.fails_at = fails_at
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, batch = -1, oracle.data(0, 0, 0)[0]
    settings = {"warmup_steps": 0, "policy": "egeria", "probe": 4, "freeze_interval": 2, "snapshot_interval": 2, "total_steps": 100}
    try:
        controller = smartfrz_ds.attach_torch(model, optimizer, settings, probe_batch=batch)
        for step in range(6):
            optimizer.zero_grad()
            oracle.loss_of(model, *oracle.data(step, 0, dist.get_rank()), "fp32").backward()
            optimizer.step()
        controller.detach()
    except Exception as error:
        return {"step": step, "error": f"{type(error).__name__}: {error}"}
    return {"step": step, "error": ""}


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (names, folder):
        for name in names:
            with ranks.case(name):
                made = {"agreements": agreements, "probe at start": lambda: probe(0), "probe at stage": lambda: probe(2)}
                ranks.write(folder, name, made[name]() if name in made else train(CASES[name]))


if __name__ == "__main__":
    main()
