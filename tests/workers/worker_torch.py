"""Trains cells without DeepSpeed (DDP, FSDP2, FSDP1) and writes what came out. Launched by test_torch.py on two ranks (or four)."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import ROOT
from reference import oracle
from reference.torch_models import full, load, made, refusal, save, settings, steps, whole, wrap
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from workers import ranks
from workers import worker_torch_together as together

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes
from smartfrz_ds.signals.snapshots import Snapshots

COUNTED = CollectiveBytes()
BUCKETS: list[int] = []


def counting_hook(state, bucket):  # torch reads the annotations of a hook, and wants its own types or none
    BUCKETS.append(bucket.buffer().nbytes)
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def unsynchronised(kind: str, model: Any, last: bool) -> Any:
    if kind == "fsdp2":
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else model.no_sync()


def run(kind: str, cell: oracle.Cell, how: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """how: hook, evaluates, prefetch (the user's own), offload, and settings and options for the wrapper."""
    rank, net = dist.get_rank(), cell.net()
    offload = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if how.get("offload") else {}
    model = wrap(kind, net, **how.get("options", {}), **offload)
    if how.get("hook"):
        model.register_comm_hook(None, counting_hook)
    if how.get("prefetch"):
        for behind, front in zip(net.blocks[1:], net.blocks, strict=False):
            behind.set_modules_to_backward_prefetch([front])
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(oracle.groups_of(list(params.values()), list(cell.net().parameters()), cell.groups), lr=oracle.LR,
                                  weight_decay=oracle.DECAY)  # fmt: skip
    scheduler = oracle.schedule(optimizer)
    controller = smartfrz_ds.attach_torch(
        model, optimizer, settings(keep_state=cell.keep_state, **how.get("settings", {})), scheduler=scheduler
    )
    assert smartfrz_ds.attach_torch(model, optimizer) is controller
    groups = list(optimizer.param_groups)
    weights, moved, byte_counts, drift, held = [], [], [], 0.0, {}
    for step in range(cell.steps):
        if how.get("evaluates"):
            with torch.no_grad():
                model(oracle.data(step, 0, rank)[0])
        if event := cell.at(step):
            before = full(kind, model, params)
            getattr(controller, event[0])(event[1])
            after = full(kind, model, params)
            assert all(torch.equal(before[n], after[n]) for n in before), "a change of the layout moved weights"
            held = {n: after[n] for n in after if oracle.layer_of(n) in controller.frozen}
            byte_counts.append(controller.report().optimizer_bytes)
        optimizer.zero_grad()
        COUNTED.take()
        BUCKETS.clear()
        forward, backward = 0, {}
        for micro in range(cell.accumulation):
            with unsynchronised(kind, model, last=micro == cell.accumulation - 1):
                loss = oracle.loss_of(model, *oracle.data(step, micro, rank), cell.dtype) / cell.accumulation
                forward += sum(COUNTED.take().values())
                loss.backward()
                backward = COUNTED.take()
            assert not controller.backend.is_boundary()
        optimizer.step()
        assert controller.backend.is_boundary()
        scheduler.step()
        now = full(kind, model, params)
        drift = max([drift, *((held[n] - now[n]).abs().max().item() for n in held)])
        weights.append(torch.cat([now[n].float().view(-1) for n, _ in cell.net().named_parameters()]))
        buckets = sum(BUCKETS)
        if kind == "ddp" and not how.get("hook"):
            buckets = sum(int(x) for x in model._get_ddp_logging_data()["bucket_sizes"].split(","))
        moved.append({"forward": forward, "backward": backward, "buckets": buckets})
    assert groups == list(optimizer.param_groups)
    tensors = {"weights": torch.stack(weights)}
    for name, state in states_of(kind, model, optimizer, params).items():
        tensors |= {f"moment.{name}.{key}": whole(state[key]).clone() for key in ("exp_avg", "exp_avg_sq")}
    report = controller.report()
    facts = {"frozen": list(controller.frozen), "drift": drift, "step": controller.step, "moved": moved, "optimizer_bytes": byte_counts,
             "saved": report.saved_flops_fraction, "lr": optimizer.param_groups[0]["lr"],
             "groups": [len(g["params"]) for g in optimizer.param_groups], "name": controller.backend.name}  # fmt: skip
    return tensors, facts


def states_of(kind: str, model: nn.Module, optimizer: Any, params: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by the names of the bare net."""
    if kind == "fsdp1":  # whose parts of a parameter are torch's to put together
        return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))["state"]
    return {name.removeprefix("module."): optimizer.state[p] for name, p in params.items() if p in optimizer.state}


# --- single questions --------------------------------------------------------------------------------------------------------------


def sampled_right(controller: Any) -> list[bool]:
    """On rank 0, for each sampled parameter: whether what came out of the shards is what the bare net has there."""
    bare = {n: p.detach().view(-1) for n, p in oracle.Net().named_parameters()}
    taker = Snapshots(controller._run.layers, controller.backend, sample_size=100, seed=3)
    taker.compile(range(7))
    values = taker.take()
    names = {p: n.replace("_fsdp_wrapped_module.", "") for p, n in controller.backend._names.items()}
    requests = [] if values is None else [r for layer in taker.requests for r in layer]
    return [torch.equal(values.view(-1)[r.slots], bare[names[r.param]][r.elements]) for r in requests]


def snapshots(folder: Path) -> Any:
    """Every sampled weight, read from shards, against the bare net."""
    return {kind: sampled_right(made(kind)[2]) for kind in ("ddp", "fsdp2", "fsdp1")}


def policies(folder: Path) -> Any:
    """The same decisions, and the same probabilities to the last bit, whichever way the model is held."""
    rows = {}
    for kind in ("alone", "ddp", "fsdp2", "fsdp1"):
        model = wrap(kind, oracle.Net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        log = folder / f"events.{kind}.{dist.get_rank()}.jsonl"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "alone" is a bare model in two processes
            controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "attention", "attention": {"threshold": 0.02}, "window": 12,
                "snapshot_interval": 1, "freeze_interval": 4, "warmup_steps": 10, "total_steps": 60, "log_path": str(log),
                "guard": {"window": 3, "tolerance": 1.0}}, scheduler=scheduler)  # fmt: skip
        for step in range(28):
            optimizer.zero_grad()
            for rank in range(2) if kind == "alone" else (dist.get_rank(),):
                loss = oracle.loss_of(model, *oracle.data(step, 0, rank), "fp32")
                (loss / 2 if kind == "alone" else loss).backward()
            optimizer.step()
            scheduler.step()
            controller.observe(loss=1.0)
        report = controller.report()
        rows[kind] = {
            "events": [[e.kind, e.step, list(e.layers), dict(e.probabilities)] for e in report.events if e.kind in ("freeze", "decision")],
            "frozen": list(report.frozen),
            "saved": report.saved_flops_fraction,
            "logged": len(log.read_text().splitlines()) if log.is_file() else None,
        }
    return rows


class Tied(nn.Module):
    """Tokens in, logits over the same tokens out, with one weight for both ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Embedding(11, oracle.WIDTH)
        self.blocks = nn.ModuleList(oracle.Block(oracle.WIDTH) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(oracle.WIDTH), nn.Linear(oracle.WIDTH, 11, bias=False)
        self.head.weight = self.inp.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tied(folder: Path) -> Any:
    """The front layer freezes, its weight is the head's too: the same weights in one process, under DDP and under FSDP2."""
    ends = {}
    for mode in ("train", "freeze"):
        for kind in ("alone", "ddp", "fsdp2"):
            model: Any = Tied()
            if kind == "ddp":
                model = DistributedDataParallel(model)
            elif kind == "fsdp2":
                for block in model.blocks:
                    fully_shard(block)
                fully_shard(model)
            params = {n.removeprefix("module."): p for n, p in model.named_parameters()}
            optimizer = torch.optim.AdamW(params.values(), lr=oracle.LR, weight_decay=oracle.DECAY)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                controller = smartfrz_ds.attach_torch(model, optimizer, settings(tied=mode))
            for step in range(8):
                if step == 3:
                    controller.freeze(["embeddings", "blocks.0"])
                    shared = whole(params["inp.weight"]).clone()
                optimizer.zero_grad()
                for rank in range(2) if kind == "alone" else (dist.get_rank(),):
                    x = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(10 * step + rank))
                    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())
                    (loss / 2 if kind == "alone" else loss).backward()
                optimizer.step()
            moved = (whole(params["inp.weight"]) - shared).abs().max().item()
            ends[f"{mode}-{kind}"] = [moved, torch.cat([whole(p).view(-1) for p in params.values()]).tolist()]
    return ends


def probes(folder: Path) -> Any:
    """A policy that looks at outputs of a probe batch decides alike, whichever way the model is held."""
    rows = {}
    for kind in ("alone", "ddp", "fsdp2", "fsdp1"):
        model = wrap(kind, oracle.Net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR / 100)
        section = {
            "policy": "egeria",
            "egeria": {"window": 2, "tolerance": 0.5},
            "probe": 4,
            "warmup_steps": 2,
            "snapshot_interval": 1,
            "freeze_interval": 2,
            "cooldown": 0,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller = smartfrz_ds.attach_torch(model, optimizer, section, probe_batch=oracle.data(99, 0, 0)[0])
        for step in range(14):
            optimizer.zero_grad()
            for rank in range(2) if kind == "alone" else (dist.get_rank(),):
                loss = oracle.loss_of(model, *oracle.data(step, 0, rank), "fp32")
                (loss / 2 if kind == "alone" else loss).backward()
            optimizer.step()
        rows[kind] = [[e.kind, e.step, list(e.layers), dict(e.reasons)] for e in controller.report().events]
    return {kind: [event for event in events if event[0] != "warning"] for kind, events in rows.items()}


def resume(folder: Path) -> Any:
    """Stop with layers frozen, resume in a fresh process's objects, thaw one later: against the run that never stopped."""
    found: dict[str, Any] = {}
    for kind, frozen in (("fsdp2", "sharded"), ("fsdp2", "unsharded"), ("ddp", "sharded"), ("fsdp1", "sharded")):
        where = folder / f"ck-{kind}-{frozen}"
        more = {"keep_state": 100, "fsdp": {"frozen": frozen}}
        model, optimizer, controller = made(kind, **more)
        params = dict(model.named_parameters())
        steps(model, optimizer, range(3))
        controller.freeze(["embeddings", "blocks.0"])
        steps(model, optimizer, range(3, 5))
        controller.freeze(["blocks.1"])
        steps(model, optimizer, range(5, 6))
        save(where, model, optimizer, controller)

        def go_on(model: Any, optimizer: Any, controller: Any) -> None:
            steps(model, optimizer, range(6, 8))
            controller.thaw(["blocks.1"])
            steps(model, optimizer, range(8, 11))

        go_on(model, optimizer, controller)
        straight = full(kind, model, params)
        net = oracle.Net()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)
        model, optimizer, controller = made(kind, net, **more)
        params = dict(model.named_parameters())
        load(where, model, optimizer, controller)
        counted = controller.step  # torch takes steps of its own in there, with a rate of zero
        go_on(model, optimizer, controller)
        again = full(kind, model, params)
        model, optimizer, controller = made(kind, **more)
        forgot = refusal(lambda: optimizer.load_state_dict({"state": {}, "param_groups": [{"params": list(range(8))}]}))  # noqa: B023
        found[f"{kind}-{frozen}"] = {
            "difference": max((straight[n] - again[n]).abs().max().item() for n in straight), "counted": counted,
            "forgot": forgot, "nothing there": refusal(lambda: controller.restore(folder / "no")),  # noqa: B023
        }  # fmt: skip
    return found


def mixed_precision(folder: Path) -> Any:
    """Layers that are frozen before the first forward, and thawed later, where the forward is in bf16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    moved = {}
    for frozen in ("sharded", "unsharded"):
        model, optimizer, controller = made("fsdp2", options={"mp_policy": policy}, fsdp={"frozen": frozen})
        params = dict(model.named_parameters())
        controller.freeze(["embeddings", "blocks.0"])
        start = full("fsdp2", model, params)
        steps(model, optimizer, range(3))
        asleep = full("fsdp2", model, params)
        controller.thaw(["blocks.0"])
        steps(model, optimizer, range(3, 5))
        awake = full("fsdp2", model, params)
        names = {"inp.weight": "embeddings", "blocks.0.up.weight": "thawed", "blocks.1.up.weight": "active"}
        moved[frozen] = {
            x: [(start[n] - asleep[n]).abs().max().item(), (asleep[n] - awake[n]).abs().max().item()] for n, x in names.items()
        }
    return moved


def recomputed(folder: Path) -> Any:
    """Reentrant activation checkpointing behind a frozen prefix: the first active layer must go on training."""
    moved = {}
    for kind in ("ddp", "fsdp2"):
        net = oracle.Net()
        for block in net.blocks:
            block.forward = _reentrant(block.forward)
        options = {"static_graph": True} if kind == "ddp" else {}
        model, optimizer, controller = made(kind, net, options)
        params = dict(model.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a region whose inputs require no grad: the first block's, before anything freezes
            steps(model, optimizer, range(2))
            controller.freeze(["embeddings", "blocks.0"])
            before = full(kind, model, params)
            steps(model, optimizer, range(2, 4))
        after = full(kind, model, params)
        moved[kind] = {n: (before[n] - after[n]).abs().max().item() for n in ("blocks.0.up.weight", "blocks.1.up.weight")}
    return moved


def _reentrant(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(forward, x, use_reentrant=True)


def refusals(folder: Path) -> Any:
    """What is refused, each with the words for it."""
    said = {}

    def shared_unit() -> None:
        model = FullyShardedDataParallel(oracle.Net(), use_orig_params=True, device_id=oracle.DEVICE)
        smartfrz_ds.attach_torch(model, torch.optim.AdamW(model.parameters()), settings())

    def made_before() -> None:
        net = oracle.Net()
        optimizer = torch.optim.AdamW(net.parameters())
        smartfrz_ds.attach_torch(wrap("fsdp2", net), optimizer, settings())

    def static_and_no_sync() -> None:
        model, _, _ = made("ddp", options={"static_graph": True})
        steps(model, torch.optim.SGD(model.parameters(), lr=0.0), range(1))
        with model.no_sync():
            model(oracle.data(0, 0, 0)[0])

    def join() -> None:
        model, _, _ = made("ddp")
        with model.join():
            model(oracle.data(0, 0, 0)[0])

    def builtin_hook() -> None:
        model = wrap("ddp", oracle.Net())
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
        smartfrz_ds.attach_torch(model, torch.optim.AdamW(model.parameters()), settings())

    def in_the_middle() -> None:
        model, _, controller = made("fsdp2")
        model.set_requires_gradient_sync(False)
        oracle.loss_of(model, *oracle.data(0, 0, dist.get_rank()), "fp32").backward()
        controller.freeze(["embeddings"])

    def another_torch() -> None:
        found, torch.__version__ = torch.__version__, "2.99.0"
        try:
            made("fsdp2", untested_versions="refuse")
        finally:
            torch.__version__ = found

    said["another torch"] = refusal(another_torch)
    said["shared unit"] = refusal(shared_unit)
    said["no orig params"] = refusal(lambda: made("fsdp1", options={"use_orig_params": False}))
    said["made before"] = refusal(made_before)
    said["static and no_sync"] = refusal(static_and_no_sync)
    said["join"] = refusal(join)
    said["builtin hook"] = refusal(builtin_hook)
    said["in the middle"] = refusal(in_the_middle)
    said["gradients"] = refusal(lambda: made("fsdp2", policy="autofreeze"))
    said["one group"] = refusal(lambda: made("ddp", policy="freezeout", total_steps=100))
    return said


def hybrid(folder: Path) -> Any:
    """HSDP: two replicas of two shards (four ranks)."""
    mesh = init_device_mesh(oracle.DEVICE.type, (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer, controller = made("fsdp2", options={"mesh": mesh})
    params = dict(model.named_parameters())
    equal = sampled_right(controller)
    steps(model, optimizer, range(2))
    controller.freeze(["embeddings", "blocks.0"])
    before = full("fsdp2", model, params)
    steps(model, optimizer, range(2, 4))
    after = full("fsdp2", model, params)
    return {"equal": equal, "moved": {n: (before[n] - after[n]).abs().max().item() for n in ("blocks.0.up.weight", "blocks.1.up.weight")},
            "weights": torch.cat([after[n].view(-1) for n, _ in oracle.Net().named_parameters()]).tolist()}  # fmt: skip


def released(folder: Path) -> Any:
    """After `release` the wrapper trains as one that was made now: against a fresh one that begins with the same weights."""
    found = {}
    for kind in ("ddp", "fsdp2"):
        model, optimizer, controller = made(kind, fsdp={"frozen": "unsharded"})
        params = dict(model.named_parameters())
        steps(model, optimizer, range(2))
        controller.freeze(["embeddings", "blocks.0"])
        steps(model, optimizer, range(2, 3))
        controller.release()
        controller.release()
        net = oracle.Net()
        net.load_state_dict(full(kind, model, params))
        fresh = wrap(kind, net)
        others = dict(fresh.named_parameters())
        for one, parameters in ((model, params), (fresh, others)):
            steps(one, torch.optim.AdamW(parameters.values(), lr=oracle.LR), range(3, 6))
        got, wanted = full(kind, model, params), full(kind, fresh, others)
        moved = (got["inp.weight"] - oracle.Net().inp.weight).abs().max().item()
        found[kind] = {"difference": max((got[n] - wanted[n]).abs().max().item() for n in wanted), "moved": moved}
    return found


def thawed(folder: Path) -> Any:
    """Saved right after a thaw without kept state, before the next step: resumed against the run that went on."""
    where = folder / "ck-thawed"
    model, optimizer, controller = made("fsdp2")
    params = dict(model.named_parameters())
    steps(model, optimizer, range(2))
    controller.freeze(["embeddings"])
    steps(model, optimizer, range(2, 3))
    controller.thaw(["embeddings"])
    save(where, model, optimizer, controller)
    steps(model, optimizer, range(3, 5))
    straight = full("fsdp2", model, params)
    model, optimizer, controller = made("fsdp2")
    params = dict(model.named_parameters())
    load(where, model, optimizer, controller)
    steps(model, optimizer, range(3, 5))
    again = full("fsdp2", model, params)
    return max((straight[n] - again[n]).abs().max().item() for n in straight)


def sent(folder: Path) -> Any:
    """Bytes of gradients a step, as the status says, by the dtypes of FSDP2's mixed precision."""
    kinds = {"fp32": MixedPrecisionPolicy(), "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
             "bf16 in fp32": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}  # fmt: skip
    return {name: made("fsdp2", options={"mp_policy": policy})[2].backend.reduced_bytes() for name, policy in kinds.items()}


def built(folder: Path) -> Any:
    """launch/examples/pretrain_fsdp.py's model, made on the meta device under FSDP2: how far its weights are from a whole one's."""
    sys.path.insert(0, str(ROOT / "launch" / "examples"))  # the scripts there import each other in this way too
    import pretrain_fsdp
    from model import Gpt, Shape

    expected = Gpt(Shape(blocks=3, width=20, length=7))
    expected.load_initial_weights(5)
    found = {}
    for name, options in {"fsdp2": [], "bf16": ["--bf16"], "ddp": ["--ddp"], "another seed": ["--seed", "6"]}.items():
        small = ["--blocks", "3", "--width", "20", "--length", "7", "--seed", "5", *options]
        model = pretrain_fsdp.build(pretrain_fsdp.arguments(small), oracle.DEVICE)
        pairs = list(zip(model.parameters(), expected.parameters(), strict=True))
        largest = max((whole(p) - q).abs().max().item() for p, q in pairs)
        local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p, _ in pairs)
        found[name] = {"difference": largest, "share": local / sum(q.numel() for _, q in pairs)}
    return found


ALL = (snapshots, policies, probes, tied, resume, mixed_precision, recomputed, refusals, released, thawed, sent, hybrid, built)
CASES = {f.__name__: f for f in (*ALL, *together.ALL)}


def main() -> None:
    with ranks.job() as (job, folder):
        for item in job["cells"]:
            cell = oracle.Cell(**item["cell"])
            with ranks.case(cell.name):
                tensors, facts = run(item["kind"], cell, item["how"])
                save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{cell.name}.{dist.get_rank()}.safetensors")
                ranks.write(folder, cell.name, facts)
        for name in job["cases"]:
            with ranks.case(name):
                ranks.write(folder, name, CASES[name](folder))


if __name__ == "__main__":
    main()
