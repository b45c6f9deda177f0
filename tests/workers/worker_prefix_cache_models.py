"""Trains small models of transformers on ZeRO-3 and FSDP2, with the prefix cache off and on. Launched by test_prefix_cache_sharded.py."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from reference import cached_runs
from reference.torch_models import whole
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from workers import ranks
from workers.worker_exact import full

import smartfrz_ds

ROWS, EPOCHS, BATCH, LENGTH, VOCABULARY = 32, 3, 4, 8, 50
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": VOCABULARY}
DECODER = SIZES | {"num_key_value_heads": 2, "use_cache": False}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("gpt2"):
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=VOCABULARY, n_positions=16, use_cache=False))
    if name.startswith("bert"):
        model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
        model.gradient_checkpointing_enable({"use_reentrant": name == "bert-reentrant"})
        return model
    if name == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4))
    model = LlamaForCausalLM(LlamaConfig(**DECODER))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)) if name == "lora" else model


def data(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, 3, (ROWS,), generator=generator) if name.startswith("bert") else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def layers_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)


def train(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, rank = made(case["model"]), dist.get_rank()
    settings = {"policy": "manual", "order": "any", "tied": "freeze", "cache": case["cache"]}
    zero3 = case["engine"] == "z3"
    if zero3:
        if case["model"] == "mixtral":
            deepspeed.utils.set_z3_leaf_modules(model, [type(layers_of(model)[0].mlp)])
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "smartfrz": settings,
        }
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        module = smartfrz_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
        controller = module.smartfrz
    else:
        for layer in layers_of(model):
            fully_shard(layer)
        module = fully_shard(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        controller = smartfrz_ds.attach_torch(module, optimizer, settings)
    params = dict(model.named_parameters())
    controller.freeze(controller.layers[: case.get("frozen", 3)])
    module.train()
    torch.manual_seed(7 + rank)
    losses = []
    for batch in cached_runs.batches(data(case["model"]), epochs=EPOCHS, batch=BATCH, rank=rank, world=dist.get_world_size()):
        loss = module(**batch).loss
        losses.append(loss.item())
        if zero3:
            module.backward(loss)
            module.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    now = full(model) if zero3 else {n: whole(p) for n, p in params.items()}
    facts = {"note": controller.report().cache_note, "hits": cached_runs.hits_of(controller)}
    controller.detach()
    if zero3:
        module.destroy()
    return {"weights": torch.cat([p.float().reshape(-1) for p in now.values()]), "losses": torch.tensor(losses)}, facts


def main() -> None:
    with ranks.job() as (cases, folder):
        for case in cases:
            with ranks.case(case["name"]):
                tensors, facts = train(case)
                save_file(tensors, folder / f"{case['name']}.{dist.get_rank()}.safetensors")
                ranks.write(folder, case["name"], facts)


if __name__ == "__main__":
    main()
