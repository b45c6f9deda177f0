"""Freezes on real PipelineEngines; writes the weights after each step and what each stage executed. Launched by test_pipeline.py.

On two ranks "pp": 2 is one pipeline of two stages, on four ranks "pp": 4 is one of four and "pp": 2 two replicas of two stages.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import p2p
from reference import oracle
from reference.bounds import Noisy, no_noise
from safetensors.torch import save_file
from torch import Tensor, nn
from workers import ranks

import smartfrz_ds
from smartfrz_ds.backends.pipeline.layers import module_at

BLOCKS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def entries(blocks: int = BLOCKS) -> list[nn.Module]:
    """The list of layers: one in front, blocks, two behind, all with the same weights on every rank."""
    torch.manual_seed(0)
    front = nn.Linear(oracle.INPUTS, oracle.WIDTH)
    middle = [oracle.Block(oracle.WIDTH) for _ in range(blocks)]
    return [front, *middle, nn.LayerNorm(oracle.WIDTH), nn.Linear(oracle.WIDTH, oracle.CLASSES)]


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.float(), y)


def batches(step: int, micro: int, replica: int, dtype: str) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(DTYPES[dtype]), y) for x, y in (oracle.data(step, m, replica) for m in range(micro))]


def groups_of(params: list[Any]) -> list[Any]:
    """As people do: no decay of biases and norms."""
    thin = [p for p in params if p.ndim < 2]
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": thin, "weight_decay": 0.0}]


def engine_for(case: dict[str, Any], *, plain: bool = False) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_accumulation_steps": case["micro"],
        "gradient_clipping": case.get("clip", 0.0),
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case.get("stage", 0), "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "weight_decay": oracle.DECAY, "torch_adam": True}},
        "pipeline": {"use_reentrant": False, "activation_checkpoint_interval": case.get("checkpoint", 0)},
        "smartfrz": {"policy": "manual", **case.get("smartfrz", {})},
        **case.get("config", {}),
    }
    if case.get("dtype") == "bf16":
        config["bf16"] = {"enabled": True}
    module = PipelineModule(entries(), num_stages=case["pp"], loss_fn=loss_of, partition_method=case.get("partition", "uniform"))
    params = [p for p in module.parameters() if p.requires_grad]
    if case.get("groups"):
        params = groups_of(params)
    initialize = deepspeed.initialize if plain else smartfrz_ds.initialize
    return initialize(model=module, model_parameters=params, config=config)[0]


def weights(engine: Any) -> Tensor:
    """All weights of the whole list, in order, on every rank: each stage's first replica puts in its own."""
    pipe, replica = engine.module, engine.grid.get_data_parallel_id()
    parts = []
    for i, entry in enumerate(entries()):
        module = module_at(pipe, i)
        for name, p in entry.named_parameters():
            own = module is not None and replica == 0
            part = dict(module.named_parameters())[name].detach().double() if own and module is not None else torch.zeros_like(p).double()
            parts.append(part.reshape(-1))
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    return flat.float()


def count_instructions(engine: Any) -> Counter[str]:
    """Counts what this stage really executes."""
    seen: Counter[str] = Counter()

    def counted(kind: type, function: Any) -> Any:
        def run(self: Any, **kwargs: Any) -> Any:
            seen[kind.__name__] += 1
            return function(self, **kwargs)

        return run

    engine._INSTRUCTION_MAP = {kind: counted(kind, f) for kind, f in engine._INSTRUCTION_MAP.items()}
    return seen


def digest(history: dict[str, Any]) -> str:
    told = hashlib.sha256()
    for name, item in history.items():
        told.update(name.encode() + item["steps"].numpy().tobytes() + item["weights"].numpy().tobytes())
    return told.hexdigest() if history else ""


@contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """What this stage sends to its neighbours, in bytes, added up in the one element of the list."""
    total, send = [0], p2p.send

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        total[0] += tensor.nbytes
        return send(tensor, *args, **kwargs)

    p2p.send = counted
    try:
        yield total
    finally:
        p2p.send = send


def sampled_right(controller: Any, replica: int) -> dict[str, Any]:
    """Whether a snapshot has the weights of all stages (on the rank that gets it), and whether this rank took part in it."""
    snapshots, recorded = controller._recording.snapshots, controller._recording._recorded
    expected = torch.zeros(snapshots.rows * snapshots.sample_size, device=controller.backend.device)
    for request in (r for layer in controller._run.layers if layer.name in recorded for r in snapshots.requests[layer.position]):
        if replica == 0:
            expected[request.slots] = request.param.detach().flatten()[request.elements].float()
    dist.all_reduce(expected)
    taken = snapshots.take()
    return {"takes_part": snapshots._groups.holds_samples, "equal": None if taken is None else torch.equal(taken.flatten(), expected)}


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    engine = engine_for(case)
    seen = count_instructions(engine)
    controller, replica = engine.smartfrz, engine.grid.get_data_parallel_id()
    history, losses, counts, byte_counts, sent_bytes = [], [], [], [], []
    for step in range(case["steps"]):
        if action := case["plan"].get(str(step)):
            getattr(controller, action[0])(action[1])
        seen.clear()
        with counting_bytes() as sent:
            loss = engine.train_batch(iter(batches(step, case["micro"], replica, case.get("dtype", "fp32"))))
        sent_bytes.append(sent[0])
        losses.append(float(loss))
        counts.append(dict(seen))
        byte_counts.append(controller.report().optimizer_bytes)
        history.append(weights(engine))
        if step in case.get("evaluate", []):
            engine.eval_batch(iter(batches(100 + step, case["micro"], replica, case.get("dtype", "fp32"))))
        if step + 1 in case.get("saves", []):
            engine.save_checkpoint(str(folder / case["name"]), client_state={"mine": step + 1})
    if dist.get_rank() == 0:
        save_file({"weights": torch.stack(history)}, folder / f"{case['name']}.safetensors")
    report = controller.report()
    out = {
        "losses": losses,
        "counts": counts,
        "bytes": byte_counts,
        "stage": engine.stage_id,
        "parts": list(engine.module.parts),
        "held": [i for i in range(len(entries())) if module_at(engine.module, i) is not None],
        "layers": list(controller.layers),
        "frozen": list(controller.frozen),
        "events": [[e.kind, e.step, list(e.layers), e.bytes_released_total] for e in report.events],
        "moves": [[e.step, list(e.bounds), e.moved_bytes, e.gain] for e in report.events if e.kind == "rebalance"],
        "history": digest(controller.state_dict()["history"]),
        "sent": sent_bytes,
        "saved": report.saved_flops_fraction,
        "samples": sampled_right(controller, replica),
    }
    if "keep_active" in case.get("smartfrz", {}):
        try:
            controller.freeze([*controller.frozen, "layers.5", "layers.6", "layers.7", "layers.8"])
        except ValueError as error:
            out["refused"] = str(error)
    engine.destroy()
    if case.get("plain"):
        out["plain"] = plain_load(case, folder / f"{case['name']}-plain")
    out["resumed"] = {k: resume(case, folder / case["name"], k, history) for k in case.get("saves", [])}
    return out


def plain_load(case: dict[str, Any], folder: Path) -> str:
    """What DeepSpeed alone says to its own checkpoint."""
    engine = engine_for(case, plain=True)
    engine.train_batch(iter(batches(0, case["micro"], engine.grid.get_data_parallel_id(), case["dtype"])))
    engine.save_checkpoint(str(folder))
    try:
        engine.load_checkpoint(str(folder))
    except Exception as error:
        return repr(error)
    return "loaded"


def resume(case: dict[str, Any], folder: Path, k: int, history: list[Tensor]) -> dict[str, Any]:
    """A new engine with other weights goes on from step k: how far from the undisturbed run it ever is, and what it began with."""
    engine = engine_for(case)
    with torch.no_grad():
        for p in engine.module.parameters():
            p.mul_(0.5)
    _, client = engine.load_checkpoint(str(folder), tag=f"global_step{k}")
    seen = {
        "frozen": list(engine.smartfrz.frozen),
        "step": engine.smartfrz.step,
        "client": {k: v for k, v in client.items() if k in ("mine", "smartfrz_ds")},
    }
    seen["start"] = bool(torch.equal(weights(engine), history[k - 1]))
    worst = 0.0
    for step in range(k, case["steps"]):
        if (action := case["plan"].get(str(step))) and step > k - 1:
            getattr(engine.smartfrz, action[0])(action[1])
        engine.train_batch(iter(batches(step, case["micro"], engine.grid.get_data_parallel_id(), case.get("dtype", "fp32"))))
        worst = max(worst, (weights(engine) - history[step]).abs().max().item())
    engine.destroy()
    return seen | {"worst": worst}


# --- the single process --------------------------------------------------------------------------------------------------------------


def reference(case: dict[str, Any], replicas: int, noise: Noisy = no_noise) -> dict[str, Any]:
    """Weights after each step and losses of plain torch, one process. noise: of gradients."""
    dtype = case.get("dtype", "fp32")
    net = nn.Sequential(*entries()).to(DTYPES[dtype])
    params = list(net.parameters())
    masters = {p: p.detach().float().clone().requires_grad_(True) for p in params}
    live = list(params)
    held = list(masters.values())
    optimizer = torch.optim.AdamW(groups_of(held) if case.get("groups") else held, lr=oracle.LR, weight_decay=oracle.DECAY)
    names = ["embeddings", *(f"layers.{i}" for i in range(1, BLOCKS + 1)), "head"]
    of = {name: list(net[i].parameters()) for i, name in enumerate(names[:-1])}
    out: dict[str, Any] = {"weights": [], "losses": []}
    for step in range(case["steps"]):
        action = case["plan"].get(str(step))
        if action and action[0] != "rebalance":  # where a layer is makes no difference
            for name in action[1]:
                for p in of[name]:
                    p.requires_grad_(action[0] == "thaw")
                    if not case.get("keep"):  # the released state is gone, and a master comes back from the weight
                        optimizer.state.pop(masters[p], None)
                        masters[p].data.copy_(p.detach())
            live = [p for p in params if p.requires_grad]
        total = {p: torch.zeros_like(p) for p in live}
        losses = []
        for replica in range(replicas):
            gradient = {p: torch.zeros_like(p) for p in live}
            for x, y in batches(step, case["micro"], replica, dtype):
                loss = loss_of(net(x), y)
                losses.append(loss.item())
                for p, g in zip(live, torch.autograd.grad(loss / case["micro"], live), strict=True):
                    gradient[p] += g
            for p in live:
                total[p] += gradient[p] / replicas
        if clip := case.get("clip", 0.0):
            norm = sum(g.float().norm() ** 2 for g in total.values()) ** 0.5
            factor = min(1.0, clip / (float(norm) + 1e-6))
            total = {p: g * factor for p, g in total.items()}
        optimizer.zero_grad()
        for p in live:
            masters[p].grad = noise(step, total[p].float())
        optimizer.step()
        with torch.no_grad():
            for p in live:
                p.copy_(masters[p])
        out["weights"].append(torch.cat([p.detach().float().view(-1) for p in params]))
        out["losses"].append(sum(losses) / len(losses))
    out["weights"] = torch.stack(out["weights"])
    return copy.copy(out)


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for case in job:
            with ranks.case(case["name"]):
                ranks.write(folder, case["name"], run(case, folder))


if __name__ == "__main__":
    main()
