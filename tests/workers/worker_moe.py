"""Hugging Face's mixture-of-experts models on two ranks, with DeepSpeed's own leaf modules in effect. Launched by test_moe.py."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules
from deepspeed.utils.z3_leaf_module import unset_z3_leaf_modules
from reference import oracle
from torch import Tensor, nn
from workers import ranks

import smartfrz_ds
from smartfrz_ds.cli.doctor_refusals import check_together

STEPS, AT = 7, {2: "embeddings", 3: "model.layers.0", 4: "model.layers.2"}  # a prefix grows, then one behind an active layer
KINDS = ("Mixtral", "Qwen2Moe", "Qwen3Moe")


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    if kind == "Mixtral":
        sizes["num_local_experts"] = 4
    else:
        sizes |= {"num_experts": 4, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
        sizes |= {"shared_expert_intermediate_size": 8} if kind == "Qwen2Moe" else {"head_dim": 8}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    return model.train()


def tokens(step: int, rank: int) -> Tensor:
    return torch.randint(0, 48, (oracle.BATCH, 10), generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: Any, step: int, rank: int) -> Tensor:
    ids = tokens(step, rank)
    return nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def config(stage: int, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "weight_decay": oracle.DECAY, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6, "stage3_param_persistence_threshold": 0, **zero},
        "smartfrz": {"policy": "manual", "order": "any"},
    }


def weights(model: nn.Module) -> Tensor:
    params = list(model.parameters())
    with deepspeed.zero.GatheredParameters([p for p in params if hasattr(p, "ds_id")]):
        return torch.cat([p.detach().flatten().clone() for p in params])


def reference(kind: str, *, freezes: bool) -> list[Tensor]:
    """One process in plain torch."""
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
    history = []
    for step in range(STEPS):
        if freezes and step in AT:
            for name, p in model.named_parameters():
                if name.startswith("model.embed_tokens." if AT[step] == "embeddings" else AT[step] + "."):
                    p.requires_grad_(False)
                    p.grad = None
        live = [p for p in model.parameters() if p.requires_grad]
        per_rank = [torch.autograd.grad(loss_of(model, step, rank), live) for rank in (0, 1)]
        for p, *grads in zip(live, *per_rank, strict=True):
            p.grad = grads[0] / 2 + grads[1] / 2
        optimizer.step()
        history.append(weights(model))
    return history


def run(kind: str, stage: int, *, freezes: bool, **zero: Any) -> tuple[list[Tensor], dict[str, Any]]:
    model = build(kind)
    initialize = smartfrz_ds.initialize if freezes else deepspeed.initialize
    engine = initialize(model=model, model_parameters=list(model.parameters()), config=config(stage, **zero))[0]
    history, sizes = [], []
    for step in range(STEPS):
        if freezes and step in AT:
            engine.smartfrz.freeze([AT[step]])
        engine.backward(loss_of(engine, step, dist.get_rank()))
        engine.step()
        history.append(weights(model))
        if freezes:
            sizes.append(engine.smartfrz.report().optimizer_bytes)
    facts = {"leaves": len(get_z3_leaf_modules(model)), "bytes": sizes, "frozen": list(engine.smartfrz.frozen) if freezes else []}
    engine.destroy()
    return history, facts


def apart(a: list[Tensor], b: list[Tensor]) -> list[float]:
    return [(x - y).abs().max().item() for x, y in zip(a, b, strict=True)]


def train(kind: str, stages: list[int]) -> dict[str, Any]:
    """apart: from one process with the same freezes; own: the same engine with nothing frozen from one process with nothing frozen."""
    expected, unfrozen = reference(kind, freezes=True), reference(kind, freezes=False)
    out: dict[str, Any] = {"control": apart(expected, unfrozen)}
    for stage in stages:
        zero = {"leaf_module": {"classes": []}} if stage == 3 else {}
        ours, facts = run(kind, stage, freezes=True, **zero)
        out[str(stage)] = facts | {"apart": apart(ours, expected)}
        if stage == 3:
            out[str(stage)]["own"] = apart(run(kind, stage, freezes=False, **zero)[0], unfrozen)
    return out


class Routed(nn.Module):
    """Experts in a list, as DBRX, DeepSeek and transformers before 5 have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts[0](x)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(oracle.INPUTS, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), Routed()) for _ in range(3))
        self.head = nn.Linear(16, oracle.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def start(model: nn.Module, stage: int, *, marked_after: type | None = None, **zero: Any) -> str:
    """The error of a start; empty where it starts, freezes and steps."""
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config(stage, **zero))[0]
    if marked_after is not None:
        set_z3_leaf_modules(model, [marked_after])
    try:
        smartfrz_ds.attach(engine)
    except ValueError as error:
        return str(error)
    finally:
        if not hasattr(engine, "smartfrz"):
            engine.destroy()
    engine.smartfrz.freeze(engine.smartfrz.layers[:1])
    if isinstance(model, Toy):
        x, y = oracle.data(0, 0, dist.get_rank())
        loss = oracle.loss_of(engine, x, y, "fp32")
    else:
        loss = loss_of(engine, 0, dist.get_rank())
    engine.backward(loss)
    engine.step()
    engine.destroy()
    return ""


def refusals() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in KINDS:
        out[kind] = start(build(kind), 3)
        out[f"doctor, {kind}"] = [f"{f.text}: {f.answer}" for f in check_together(build(kind), config(3))]
    own = type(build("Mixtral").model.layers[0].mlp)
    out["user's class"] = start(build("Mixtral"), 3, leaf_module={"classes": [own.__name__]})
    out["user's names"] = start(build("Mixtral"), 3, leaf_module={"classes": [], "names": ["model.layers.1.mlp"]})
    out["user's suffixes"] = start(build("Mixtral"), 3, leaf_module={"classes": [], "name_suffixes": [".mlp"]})
    out["user's class, stage 2"] = start(build("Mixtral"), 2, leaf_module={"classes": [own.__name__]})
    out["experts in a list"] = start(Toy(), 3, leaf_module={"classes": "Routed"})
    out["experts in a list, stage 2"] = start(Toy(), 2, leaf_module={"classes": "Routed"})
    called = Toy()
    set_z3_leaf_modules(called, [Routed])
    out["script's call"] = start(called, 3)
    marked = Toy()
    set_z3_leaf_modules(marked, [Routed])
    out["script's call, stage 2"] = start(marked, 2)
    unset_z3_leaf_modules(marked, [Routed])
    out["unset again"] = start(marked, 3)
    out["script's call after initialize"] = start(Toy(), 3, marked_after=Routed)
    out["by size"] = start(Toy(), 3, stage3_module_granularity_threshold=10**6)
    return out


def main() -> None:
    with ranks.job() as (cases, folder):  # name -> the stages that it trains at
        for name, stages in cases.items():
            with ranks.case(name):
                ranks.write(folder, name, refusals() if name == "refusals" else train(name, stages))


if __name__ == "__main__":
    main()
