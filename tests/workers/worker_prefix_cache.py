"""Trains with the prefix cache off and on, on real engines: weights after each step, losses, hits, bytes, and where the rows lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from reference import cached_runs, oracle
from reference.torch_models import full as whole_weights
from reference.torch_models import wrap
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from workers import ranks
from workers.worker_exact import full

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes
from smartfrz_ds.distributed import hosts
from smartfrz_ds.distributed.collectives import Collectives

NAME = hosts.name_of_this_host
ROWS, EPOCHS = 32, 4
STEPS = EPOCHS * ROWS // 2 // oracle.BATCH  # micro-batches of each of two ranks


class Checkpointed(oracle.Net):
    """Each block is a region of activation checkpointing."""

    def __init__(self, region: Callable[..., Tensor]) -> None:
        super().__init__()
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = self.region(block, x)
        return self.head(x)


class Reads(oracle.Net):
    """Reads the output of a frozen block besides what leaves the prefix. What it does with NaN: `answer`."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        x = early = self.inp(x)
        for block in self.blocks[:4]:
            x = block(x)
        if self.answer == "raises" and early.isnan().any():
            raise ArithmeticError("NaN in the model")
        if self.answer == "raises-on-0" and early.isnan().any() and dist.get_rank() == 0:
            raise ArithmeticError("NaN on one rank")
        return self.head(self.blocks[4](x) + early)


REGIONS: dict[str, Callable[..., Tensor]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "deepspeed": lambda function, x: deepspeed.checkpointing.checkpoint(function, x),
}


def model_for(case: dict[str, Any]) -> nn.Module:
    name = case.get("model", "net")
    return oracle.Net() if name == "net" else Checkpointed(REGIONS[name]) if name in REGIONS else Reads(name)


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(ROWS, oracle.INPUTS, generator=generator),
        "y": torch.randint(0, oracle.CLASSES, (ROWS,), generator=generator),
    }


def engine_for(case: dict[str, Any], model: torch.nn.Module) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": 3000, "allgather_bucket_size": 2000} | case.get("zero", {}),
        "zero_force_ds_cpu_optimizer": False,
        "smartfrz": settings(case),
    }
    if case.get("dtype") == "bf16":
        config["bf16"] = {"enabled": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
    return smartfrz_ds.initialize(model=model, optimizer=optimizer, config=config)[0]


def settings(case: dict[str, Any]) -> dict[str, Any]:
    return {"policy": "manual", "order": "any", "cache": case["cache"]} | case.get("smartfrz", {})


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """Those of fully_shard."""
    options: dict[str, Any] = {}
    if case.get("dtype") == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if case.get("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if "reshard" in case:
        options["reshard_after_forward"] = case["reshard"]
    return options


def sampled(kind: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of a real loader, with a sampler over all ranks."""
    rows = data()
    dataset = TensorDataset(rows["x"], rows["y"])
    sampler = smartfrz_ds.HostSampler(dataset, seed=1) if kind == "host" else DistributedSampler(dataset, seed=1)
    loader = DataLoader(dataset, oracle.BATCH, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        yield from ({"x": x, "y": y} for x, y in loader)


def lose(controller: Any, folder: Path) -> None:
    """The file of rows on disk loses its content: a file system that goes away gives the same errors to a reader."""
    os.ftruncate(controller._cache._store._stores[-1].descriptor, 0)


def poison(controller: Any, folder: Path) -> None:
    """Bytes of all rows change on the disk."""
    store = controller._cache._store._stores[-1]
    for entry in range(store.rows):
        os.pwrite(store.descriptor, b"\xff\x00\xff", int(store._entries["offset"][entry]) + 5)


FAULTS: dict[str, Callable[[Any, Path], object]] = {
    "lost": lose,
    "poisoned": poison,
    "folder": lambda controller, folder: shutil.rmtree(folder),
}


class Run:
    """One training. See the keys of the cases in the tests."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.bare, self.rank = case, model_for(case), dist.get_rank()
        if case.get("apart"):  # each rank counts as a host of its own, with a store of its own
            hosts.name_of_this_host = lambda: f"host-{self.rank}"
        self.is_torch = case["kind"] != "deepspeed"
        if self.is_torch:
            self.module: Any = wrap(case["kind"], self.bare, **options_of(case))
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
            self.controller = smartfrz_ds.attach_torch(self.module, self.optimizer, settings(case))
        else:
            self.module = engine_for(case, self.bare)
            self.controller = self.module.smartfrz
        self.params = dict(self.bare.named_parameters())
        if case.get("ahead"):  # every unit gathers the next two, as a user may ask for
            units = [m for m in self.bare.modules() if isinstance(m, FSDPModule)]
            for k, unit in enumerate(units):
                unit.set_modules_to_forward_prefetch(units[k + 1 : k + 3])

    def weights(self) -> Tensor:
        now = whole_weights("fsdp2", self.module, self.params) if self.case["kind"] == "fsdp2" else full(self.bare)
        return torch.cat([p.float().view(-1) for p in now.values()])

    def before(self, step: int) -> None:
        case, layers = self.case, self.controller.layers
        if case.get("fault", {}).get("step") == step:
            dist.barrier()
            if self.rank == 0:
                FAULTS[case["fault"]["what"]](self.controller, Path(case["cache"]["path"]))
            dist.barrier()
        if step == case.get("deeper"):
            self.controller.freeze(layers[4:5])
        if step == case.get("thaw"):
            self.controller.thaw(layers[2:4])
        if step == case.get("write"):
            self.write()
        if step in case.get("evaluations", ()):
            self.module.eval()
            with torch.no_grad():
                self.module(torch.zeros(3, oracle.INPUTS))
            self.module.train()
        if step in case.get("alone", ()) and self.rank == 0:  # needs weights that are all gathered
            self.module.eval()
            with torch.no_grad():
                self.module(torch.zeros(3, oracle.INPUTS))
            self.module.train()
            with torch.no_grad():
                self.module(torch.zeros(2, oracle.INPUTS))

    @torch.no_grad()
    def write(self) -> None:
        """Change a frozen weight whose shard is on rank 1 alone."""
        weight = self.bare.blocks[1].up.bias
        if self.case["kind"] == "fsdp2":
            local = self.params["blocks.1.up.bias"]._local_tensor
            if self.rank == 1:
                local[-1] += 0.5
        else:
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if self.rank == 0:
                    weight[-1] += 0.5

    def step(self, number: int, batch: dict[str, Tensor]) -> tuple[float, dict[str, int], dict[str, int]]:
        WIRE.take()
        loss = oracle.loss_of(self.module, batch["x"], batch["y"], "fp32" if self.is_torch else self.case.get("dtype", "fp32"))
        forward = WIRE.take()
        if not self.is_torch:
            self.module.backward(loss)
            backward = WIRE.take()
            self.module.step()
            return loss.item(), forward, backward
        accumulation = self.case.get("accumulation", 1)
        last = number % accumulation == accumulation - 1
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        loss.backward()
        backward = WIRE.take()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item(), forward, backward

    def train(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        case, controller = self.case, self.controller
        controller.freeze([controller.layers[k] for k in case.get("frozen", [0, 1, 2, 3])])
        weights, losses, wire = [], [], []
        self.module.train()
        feed = cached_runs.batches(data(), epochs=EPOCHS, batch=oracle.BATCH, rank=self.rank, world=dist.get_world_size())
        if "sampler" in case:
            feed = sampled(case["sampler"])
        for number, batch in enumerate(feed):
            self.before(number)
            if case.get("noise") == self.rank:  # this rank never sees a row again
                batch["x"] = batch["x"] + number
            if number in case.get("short", ()) and self.rank == 1:
                batch = {k: v[:3] for k, v in batch.items()}
            loss, *counts = self.step(number, batch)
            losses.append(loss)
            wire.append([sum(n for name, n in count.items() if "gather" in name) for count in counts])
            if not case.get("alone") or number == STEPS - 1:  # a look at the weights lets go of those that are gathered
                weights.append(self.weights())
        watch = controller._cache
        cache = None if watch is None else watch._cache
        shapes = [int(getattr(p, "ds_numel", p.numel())) for p in self.params.values()]
        facts = {
            "warnings": [e.message for e in controller.report().events if e.kind == "warning"],
            "note": controller.report().cache_note,
            "hosts": hosts.hosts_of_ranks(Collectives(torch.device("cpu"))),
            "hits": cached_runs.hits_of(controller),
            "rows": None if watch is None or watch._store is None else watch._store.rows,
            "wire": wire,
            "carried": 0 if cache is None else cache.gain.carried,
            "exchange": 0 if cache is None else cache.gain.exchange,
            "sizes": dict(zip(self.params, shapes, strict=True)),
        }
        controller.detach()
        hosts.name_of_this_host = NAME
        if not self.is_torch:
            self.module.destroy()
        return {"weights": torch.stack(weights), "losses": torch.tensor(losses)}, facts


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """One step with a frozen prefix on an engine without the cache, and what mode "on" raises there."""
    errors, notes = [], []
    for mode in ("on", "auto"):
        case["cache"] = {"mode": mode}
        module = wrap(case["kind"], oracle.Net())
        optimizer = torch.optim.AdamW(module.parameters(), lr=oracle.LR)
        try:
            controller = smartfrz_ds.attach_torch(module, optimizer, settings(case))
        except ValueError as error:
            errors.append(str(error))
            continue
        controller.freeze(controller.layers[:3])
        oracle.loss_of(module, *oracle.data(0, 0, dist.get_rank()), "fp32").backward()
        optimizer.step()
        notes.append(controller.report().cache_note)
        controller.detach()
    return {"errors": errors, "notes": notes}


def main() -> None:
    global WIRE
    WIRE = CollectiveBytes()  # before the process group: DeepSpeed keeps some of the functions that it finds then
    with ranks.job() as (cases, folder):
        for case in cases:
            with ranks.case(case["name"]):
                if case.get("refused"):
                    ranks.write(folder, case["name"], refused(case))
                    continue
                tensors, facts = Run(case).train()
                save_file(tensors, folder / f"{case['name']}.{dist.get_rank()}.safetensors")
                ranks.write(folder, case["name"], facts)


if __name__ == "__main__":
    main()
