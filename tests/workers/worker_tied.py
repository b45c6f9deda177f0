"""Freezes under tied embeddings on real PipelineEngines, and the single process that they are compared with. Launched by
test_pipeline_tied.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from reference import oracle
from reference.bounds import Noisy, no_noise
from safetensors.torch import save_file
from torch import Tensor, nn
from workers import ranks

import smartfrz_ds
from smartfrz_ds.backends.pipeline.layers import module_at, shared_weights

VOCABULARY, BLOCKS = 11, 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Embed(nn.Embedding):
    """Token ids (batch, length) to their mean (batch, width)."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).mean(1)


def logits(module: Embed, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight)


def lookup(module: Embed, ids: Tensor) -> Tensor:
    """What `Embed` does, past the module."""
    return nn.functional.embedding(ids, module.weight).mean(1)


def entries(front_fn: Any = None) -> list[Any]:
    front = TiedLayerSpec("word", Embed, VOCABULARY, oracle.WIDTH, forward_fn=front_fn)
    back = TiedLayerSpec("word", Embed, VOCABULARY, oracle.WIDTH, forward_fn=logits)
    return [front, *[LayerSpec(oracle.Block, oracle.WIDTH)] * BLOCKS, LayerSpec(nn.LayerNorm, oracle.WIDTH), back]


def initial() -> list[Tensor]:
    """Of each entry but the last, its weights, flat."""
    torch.manual_seed(0)
    modules = [Embed(VOCABULARY, oracle.WIDTH), *(oracle.Block(oracle.WIDTH) for _ in range(BLOCKS)), nn.LayerNorm(oracle.WIDTH)]
    return [nn.utils.parameters_to_vector(m.parameters()).detach() for m in modules]


def batches(step: int, micro: int, replica: int) -> list[tuple[Tensor, Tensor]]:
    out = []
    for m in range(micro):
        g = torch.Generator().manual_seed(1000 * step + 10 * m + replica)
        out.append((torch.randint(0, VOCABULARY, (4, 5), generator=g), torch.randint(0, VOCABULARY, (4,), generator=g)))
    return out


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.float(), y)


def engine_for(case: dict[str, Any], scale: float = 1.0) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": case["micro"],
        "gradient_clipping": case.get("clip", 0.0),
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case.get("stage", 0), "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "weight_decay": oracle.DECAY, "torch_adam": True}},
        "smartfrz": {"policy": "manual", "tied": case["tied"], **case.get("smartfrz", {})},
    }
    if case.get("dtype") == "bf16":
        config["bf16"] = {"enabled": True}
    listed = entries(lookup if case.get("front") == "function" else None)
    module = PipelineModule(listed, num_stages=case["pp"], loss_fn=loss_of, partition_method="uniform")
    with torch.no_grad():
        for i, values in enumerate([*initial(), initial()[0]]):
            if (held := module_at(module, i)) is not None:
                nn.utils.vector_to_parameters(values * scale, held.parameters())
    return smartfrz_ds.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]


def weights(engine: Any) -> Tensor:
    """All weights, in order, on every rank; the shared one as the front has it, and at the end as the rear has it."""
    parts = []
    for i, values in enumerate([*initial(), initial()[0]]):
        held = module_at(engine.module, i) if engine.grid.get_data_parallel_id() == 0 else None
        parts.append(torch.zeros_like(values) if held is None else nn.utils.parameters_to_vector(held.parameters()).detach().float())
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    return flat


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    engine = engine_for(case)
    controller, replica = engine.smartfrz, engine.grid.get_data_parallel_id()
    history, losses, shared_state, reduced = [], [], [], []
    for step in range(case["steps"]):
        if action := case["plan"].get(str(step)):
            getattr(controller, action[0])(action[1])
        with counting() as calls:
            losses.append(float(engine.train_batch(iter(batches(step, case["micro"], replica)))))
        reduced.append(calls[0])
        history.append(weights(engine))
        shared_state.append(sum(any(w is p for i in range(len(controller.backend.groups)) for p in controller.backend.active(i))
                                for w in shared_weights(engine.module, "word")))  # fmt: skip
        if step + 1 == case.get("save"):
            engine.save_checkpoint(str(folder / case["name"]))
    if dist.get_rank() == 0:
        save_file({"weights": torch.stack(history)}, folder / f"{case['name']}.safetensors")
    layers = {x.name: x.numel for x in controller._run.layers}
    out = {"losses": losses, "layers": layers, "trains": shared_state, "stage": engine.stage_id, "reduced": reduced}
    out["saved"] = controller.report().saved_flops_fraction
    engine.destroy()
    if "save" in case:
        engine = engine_for(case, scale=0.5)
        engine.load_checkpoint(str(folder / case["name"]))
        worst = 0.0
        for step in range(case["save"], case["steps"]):
            if action := case["plan"].get(str(step)):
                getattr(engine.smartfrz, action[0])(action[1])
            engine.train_batch(iter(batches(step, case["micro"], replica)))
            worst = max(worst, (weights(engine) - history[step]).abs().max().item())
        out["worst"] = worst
        engine.destroy()
    return out


class counting:
    """Counts the all-reduces of tied gradients: those over a group of two stages that carry a whole shared weight."""

    def __enter__(self) -> list[int]:
        import deepspeed.comm as comm

        self.calls, self.real = [0], comm.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls[0] += tuple(tensor.shape) == (VOCABULARY, oracle.WIDTH)
            return self.real(tensor, *args, **kwargs)

        comm.all_reduce = counted
        return self.calls

    def __exit__(self, *_: Any) -> None:
        import deepspeed.comm as comm

        comm.all_reduce = self.real


# --- the single process --------------------------------------------------------------------------------------------------------------


def reference(case: dict[str, Any], replicas: int, noise: Noisy = no_noise) -> tuple[Tensor, list[float]]:
    """Weights after each step, with the shared weight at the front and at the end, and losses. noise: of gradients."""
    dtype = DTYPES[case.get("dtype", "fp32")]
    modules = [Embed(VOCABULARY, oracle.WIDTH), *(oracle.Block(oracle.WIDTH) for _ in range(BLOCKS)), nn.LayerNorm(oracle.WIDTH)]
    for module, values in zip(modules, initial(), strict=True):
        nn.utils.vector_to_parameters(values.clone(), module.parameters())
    net = nn.Sequential(*modules).to(dtype)
    shared = net[0].weight
    of = {"embeddings": list(net[0].parameters()), **{f"layers.{i}": list(net[i].parameters()) for i in range(1, BLOCKS + 1)}}
    params = list(net.parameters())
    masters = {p: p.detach().float().clone() for p in params}
    optimizer = torch.optim.AdamW(list(masters.values()), lr=oracle.LR, weight_decay=oracle.DECAY)
    frozen: set[str] = set()
    history, losses = [], []
    for step in range(case["steps"]):
        if action := case["plan"].get(str(step)):
            frozen = frozen | set(action[1]) if action[0] == "freeze" else frozen - set(action[1])
            for name in action[1]:
                for p in of[name]:
                    if p is shared and case["tied"] == "train":
                        continue  # goes on training through the head
                    p.requires_grad_(action[0] == "thaw")
                    if "keep_state" not in case.get("smartfrz", {}):
                        optimizer.state.pop(masters[p], None)
                        masters[p].copy_(p.detach())
        live = [p for p in params if p.requires_grad]
        total, seen = {p: torch.zeros_like(p) for p in live}, []
        for replica in range(replicas):
            # the two uses' gradients are added up apart, as two stages do
            front, rear = {p: torch.zeros_like(p) for p in live}, torch.zeros_like(shared)
            for ids, y in batches(step, case["micro"], replica):
                copy = shared.detach().clone().requires_grad_(shared.requires_grad)
                x = net[0](ids)
                if "embeddings" in frozen:
                    x = x.detach()
                loss = loss_of(nn.functional.linear(net[1:](x), copy), y)
                seen.append(loss.item())
                wanted = [*live, copy] if copy.requires_grad else live
                got = torch.autograd.grad(loss / case["micro"], wanted, allow_unused=True)
                if copy.requires_grad:
                    rear += got[-1]
                for p, g in zip(live, got, strict=False):
                    if g is not None:
                        front[p] += g
            if shared in front:
                front[shared] += rear
            for p in live:
                total[p] += front[p] / replicas
        if clip := case.get("clip"):
            norm = sum(float(g.float().norm()) ** 2 for g in total.values()) ** 0.5
            total = {p: g * min(1.0, clip / (norm + 1e-6)) for p, g in total.items()}
        for p in params:
            masters[p].grad = noise(step, total[p].float()) if p in total else None
        optimizer.step()
        with torch.no_grad():
            for p in live:
                p.copy_(masters[p])
        history.append(torch.cat([*(p.detach().float().view(-1) for p in params), shared.detach().float().view(-1)]))
        losses.append(sum(seen) / len(seen))
    return torch.stack(history), losses


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (cases, folder):
        for case in cases:
            with ranks.case(case["name"]):
                ranks.write(folder, case["name"], refused(case) if "refused" in case else run(case, folder))


def refused(case: dict[str, Any]) -> str:
    """What is said to tied layers that can't be frozen one-sidedly, and to a weight that somebody froze on one of its stages."""
    back = TiedLayerSpec("word", Embed, VOCABULARY, oracle.WIDTH, forward_fn=logits)
    third = TiedLayerSpec("word", Embed, VOCABULARY, oracle.WIDTH, forward_fn=lambda module, x: x)
    listed = entries()
    if case["refused"] in ("three", "middle"):
        listed = [*listed[:3], third, *listed[3:]] if case["refused"] == "three" else [*listed[:-1], back, *listed[1:3]]
    module = PipelineModule(listed, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    if case["refused"] == "one-sided" and dist.get_rank() == 0:
        module.tied_modules["word"].weight.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "smartfrz": {"policy": "manual"},
    }
    try:
        engine = smartfrz_ds.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]
        if case["refused"] == "one-sided-later":
            if dist.get_rank() == 0:
                module.tied_modules["word"].weight.requires_grad_(False)
            engine.train_batch(iter(batches(0, 1, 0)))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
