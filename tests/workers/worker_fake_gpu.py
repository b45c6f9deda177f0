"""Changes the layout of real engines on a fake GPU (reference/fake_gpu.py) and writes which bytes went between host and GPU.

One process plays one rank of two. Launched by test_fake_gpu.py.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from reference import oracle, torch_models
from reference.fake_gpu import CPU, GPU, FakeGpu, fake_gpu, on_gpu
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from workers import ranks, worker_pipeline

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.factory import make_backend
from smartfrz_ds.backends.pipeline.move_layers import _Told, build, rebalance
from smartfrz_ds.backends.pipeline.parcels import Shipment
from smartfrz_ds.backends.sampler import SampleRequest
from smartfrz_ds.backends.torch.compat import make_torch_backend
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.distributed.collectives import Collectives


class Alone(Collectives):
    """Votes of this process alone: the fake process group answers nothing."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.alone, self.count = True, 1


@contextmanager
def cuda_accelerator() -> Iterator[None]:
    """DeepSpeed's accelerator under the name "cuda", and no exchange through shared memory, which waits for the other rank."""
    accelerator, module = get_accelerator(), sys.modules["deepspeed.comm.torch"]
    with ExitStack() as stack:
        for name, value in {
            "current_device_name": lambda: "cuda:0",
            "device_name": lambda index=None: "cuda" if index is None else f"cuda:{index}",
            "current_device": lambda: 0,
            "pin_memory": lambda tensor, align_bytes=1: tensor,
        }.items():
            stack.enter_context(patch.object(accelerator, name, value))
        stack.enter_context(patch.object(module, "build_shm_op", lambda: None))
        # models are where they belong, and torch can't swap fake parameters to which there are references
        stack.enter_context(patch.object(nn.Module, "_apply", lambda self, function, recurse=True: self))
        # DeepSpeed keeps its process groups in these modules
        kept = [(vars(m), dict(vars(m))) for m in (sys.modules["deepspeed.utils.groups"], sys.modules["deepspeed.comm.comm"])]
        try:
            yield
        finally:
            for now, before in kept:
                now.update(before)


def deepspeed_backend(case: dict[str, Any]) -> tuple[nn.Module, Backend]:
    dtype = torch.bfloat16 if case.get("bf16") else None
    model: Any = on_gpu(oracle.Net(blocks=case["blocks"]), dtype)
    if case.get("pipeline"):
        deepspeed.init_distributed("fake", verbose=False)
        entries, loss = [on_gpu(entry, dtype) for entry in worker_pipeline.entries(case["blocks"])], worker_pipeline.loss_of
        model = PipelineModule(entries, num_stages=2, loss_fn=loss, partition_method="uniform")
    config = {"train_micro_batch_size_per_gpu": oracle.BATCH, "steps_per_print": 10**9, "zero_force_ds_cpu_optimizer": False}
    config |= {"zero_optimization": {"stage": case["stage"]} | case.get("zero", {})} | case.get("config", {})
    if case.get("bf16"):
        config["bf16"] = {"enabled": True}
    optimizer = torch.optim.AdamW(oracle.groups_of(list(model.parameters()), list(model.parameters()), case.get("groups", 1)), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return model, make_backend(engine, zero3_frozen=case.get("frozen", "sharded"))


def torch_backend(case: dict[str, Any]) -> tuple[nn.Module, Backend]:
    model = on_gpu(oracle.Net(blocks=case["blocks"]))
    if case["kind"] == "fsdp2":
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cuda")
        for layer in (model.inp, *model.blocks, model):
            fully_shard(layer, mesh=mesh)
    if case["kind"] == "ddp":
        model = DistributedDataParallel(model, device_ids=[0], init_sync=False)
    if case["kind"] == "fsdp1":
        model = torch_models.wrap("fsdp1", model, device_id=GPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=case.get("fused", False))
    return model, make_torch_backend(model, optimizer)


def fill(backend: Backend, *, steps_beside: bool) -> None:
    """The optimizer's state after a few steps."""
    optimizer = backend.base_optimizer()
    for param in backend.masters() or [p for group in optimizer.param_groups for p in group["params"]]:
        if not optimizer.state[param]:
            count = torch.empty((), device=GPU) if steps_beside else torch.tensor(3.0)
            optimizer.state[param] = {"step": count, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}


def devices(backend: Backend, model: nn.Module) -> dict[str, list[str]]:
    """Where weights, masters, state and step counts are."""
    state = [t for entry in backend.base_optimizer().state.values() for t in entry.values() if isinstance(t, Tensor)]
    where = {
        "weights": [backend.stored(p) for p in model.parameters()],
        "parameters": [p.data for p in model.parameters()],  # under ZeRO-3 not the weights, but empty
        "masters": backend.masters(),
        "moments": [t for t in state if t.ndim],
        "steps": [t for t in state if not t.ndim],
    }
    # what DeepSpeed's wrapper holds besides, by attribute: gradient buffers, views, masks
    wrapper = getattr(backend, "wrapper", None)
    for name, value in vars(wrapper).items() if wrapper is not None else ():
        where[f"wrapper.{name}"] = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.ndim]
    return {name: sorted({t.device.type for t in tensors}) for name, tensors in where.items()}


class Run:
    """One engine, of which the front is frozen and thawed, and what each part copied: [to the host, to the GPU] as [copies, bytes]."""

    def __init__(self, gpu: FakeGpu, model: nn.Module, backend: Backend) -> None:
        self.gpu, self.model, self.backend = gpu, model, backend
        gpu.copies.clear()
        self.copies: dict[str, list[list[int]]] = {}
        self.where: dict[str, dict[str, list[str]]] = {"start": devices(backend, model)}

    def note(self, name: str) -> None:
        ways = [[c for c in self.gpu.copies if c.to_host == way] for way in (True, False)]
        self.copies[name] = [[len(way), sum(c.nbytes for c in way)] for way in ways]
        self.where[name] = devices(self.backend, self.model)
        self.gpu.copies.clear()

    def change(self, name: str, freeze: list[Any], thaw: list[Any], *, keep: bool = True, fails: bool = False) -> None:
        self.backend.check(freeze, thaw)
        self.backend.memory_need(freeze, thaw, keep=keep)
        self.backend.change_cost(set(freeze) | (self.backend.frozen - set(thaw)), keep=keep)
        self.gpu.copies.clear()
        tx = Transaction(Alone())
        self.backend.change(freeze, thaw, keep=keep, tx=tx)
        if fails:
            assert tx.roll_back(MemoryError("injected")) == "rank 0: MemoryError: injected"
        else:
            tx.finish()
        self.backend.verify()
        self.note(name)

    def sample(self, name: str) -> None:
        requests, at = [], 0
        for param in self.backend.trained():
            count = min(4, getattr(param, "ds_numel", param.numel()))
            requests.append(SampleRequest(param, torch.arange(count), torch.arange(at, at + count)))
            at += count
        sampler = self.backend.sampler(requests, at)
        self.note(f"{name}, compiled")
        for read in ("first", "second"):
            assert sampler.read(GPU).device == GPU
            self.note(f"{name}, {read} read")


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    with fake_gpu(rank=case.get("rank", 0)) as gpu, cuda_accelerator():
        make = deepspeed_backend if "stage" in case else torch_backend
        gpu.strict = False  # DeepSpeed reads counts while it builds an engine
        model, backend = make(case)
        gpu.strict = True
        fill(backend, steps_beside=case.get("fused", False))
        run = Run(gpu, model, backend)
        held = {p for group in backend.groups for p in group}
        names = {n.replace("_fsdp_wrapped_module.", "").removeprefix("module."): p for n, p in model.named_parameters()}
        front = [p for n, p in names.items() if p in held and oracle.layer_of(n) in ("embeddings", "blocks.0", "blocks.1")]
        if case.get("pipeline"):  # a stage has half of the list
            front = list(dict.fromkeys(p for p in model.parameters()))[:10]
        assert len(front) >= 10
        frozen_bytes = sum(p.numel() * p.element_size() for p in front)
        run.sample("full")
        run.change("undone", front, [], fails=True)
        run.change("freeze", front, [])
        with backend.saving() if isinstance(backend, DeepSpeedBackend) else nullcontext():
            run.note("saving")
        run.sample("frozen")
        run.change("thaw", [], front)
        run.change("freeze for good", front, [], keep=False)
        run.change("thaw afresh", [], front)
        run.sample("thawed")
        return {"copies": run.copies, "where": run.where, "frozen": frozen_bytes, "name": backend.name}


def ship() -> dict[str, Any]:
    """Weights on the GPU and state on the host, between two stages."""
    with fake_gpu() as gpu, cuda_accelerator():
        weight, state = torch.empty(30, dtype=torch.bfloat16, device=GPU), torch.zeros(50)
        coming = [torch.empty(20, device=GPU), torch.empty(7)]
        errors: list[Exception] = []
        shipment = Shipment({1: [weight, state]}, {1: coming}, None, GPU)
        sent = shipment.deliver(errors.append)
        assert not errors, errors
        return {"sent": sent, "copies": [[c.to_host, c.nbytes] for c in gpu.copies]}


def move(case: dict[str, Any]) -> dict[str, Any]:
    """Two entries from the first stage to the second, as each of them carries it out: what the first tells, the second hears."""
    heard: dict[int, Any] = {1: _Told([], {})}
    results = {}
    for rank in (0, 1):
        with fake_gpu(rank=rank) as gpu, cuda_accelerator():
            gpu.strict = False
            model, backend = deepspeed_backend(case)
            gpu.strict = True
            fill(backend, steps_beside=False)
            run = Run(gpu, model, backend)
            first, last = model.parts[0], model.parts[-1]
            bounds = [first, model.parts[1] - 2, last]

            def gather(everybody: list[Any], own: Any, group: Any = None, rank: int = rank) -> None:
                heard[rank] = own
                everybody[:] = [heard[0], heard[1]]

            with patch.object(dist, "all_gather_object", gather):
                tx = Transaction(Alone())
                sent = rebalance(backend, bounds, build(backend.engine, bounds), tx)
                tx.finish()
            run.note("moved")
            results[rank] = {"sent": sent, "copies": run.copies, "where": run.where, "entries": model._local_stop - model._local_start}
    return results


def main() -> None:
    work, folder = ranks.read_job()
    for name, case in work.items():
        with ranks.case(name):
            result = ship() if case == "ship" else move(case) if case.get("moves") else run_case(case)
            ranks.write(folder, name, result, rank=0)
        gc.collect()


if __name__ == "__main__":
    main()
