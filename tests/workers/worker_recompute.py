"""Activation checkpointing behind a frozen prefix, on real 2-rank engines. Launched by test_recompute.py, one launch for all cases.

Every case trains with checkpointing on the engine and compares with one process in plain torch that checkpoints nothing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from reference import oracle
from reference.bounds import Noisy, distance, no_noise, noisy, spread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from workers import ranks

import smartfrz_ds

STEPS = 6
FREEZES = {2: [0, 1], 4: [2]}  # before this step these layers are frozen
ITEM_TOKENS = 12


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
        )
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            use_cache=False,
        )
    )


class Regions(oracle.Net):
    """The oracle's net; `region(function, x)` runs a part of it. A part is a block, `chunk` blocks, or (inside) each half of a block."""

    def __init__(self, region: Callable[..., Tensor] | None = None, chunk: int = 1, inplace: bool = False) -> None:
        super().__init__()
        self.region, self.chunk, self.inplace = region, chunk, inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        if self.inplace:
            x += 1  # somebody works in place on what the front gives
        for begin in range(0, len(self.blocks), self.chunk):
            part = nn.Sequential(*self.blocks[begin : begin + self.chunk]) if self.chunk > 1 else self.blocks[begin]
            x = part(x) if self.region is None else self.region(part, x)
        return self.head(x)


def torch_reentrant(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=True)


def torch_non_reentrant(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=False)


def with_nothing(part: nn.Module, x: Tensor) -> Tensor:
    return part(x)


REGIONS: dict[str, Callable[..., Tensor]] = {
    "none": with_nothing,
    "torch-reentrant": torch_reentrant,
    "torch-non-reentrant": torch_non_reentrant,
    "deepspeed": lambda part, x: deepspeed.checkpointing.checkpoint(part, x),
    "deepspeed-non-reentrant": lambda part, x: deepspeed.checkpointing.non_reentrant_checkpoint(part, x),
}


def net(region: str | None, **options: Any) -> nn.Module:
    return Regions(None if region is None else REGIONS[region], **options)


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "bert": bert, "llama": llama}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]() if kind in MODELS else net(None, inplace=kind == "inplace")
    model.train()
    return model


def loss_of(model: Any, kind: str, step: int, rank: int) -> Tensor:
    if kind not in MODELS:
        x, y = oracle.data(step, 0, rank)
        return nn.functional.cross_entropy(model(x), y)
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, 50, (oracle.BATCH, ITEM_TOKENS), generator=generator)
    labels = torch.randint(0, 2, (oracle.BATCH,), generator=generator) if kind == "bert" else tokens
    return model(input_ids=tokens, labels=labels).loss


def reference(kind: str, frozen_at: dict[int, list[str]], noise: Noisy = no_noise) -> Tensor:
    """(STEPS, numel): all weights after each step of plain torch, without checkpointing. frozen_at: step -> names of parameters."""
    model = build(kind)
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
    history = []
    for step in range(STEPS):
        for name in frozen_at.get(step, []):
            params[name].requires_grad_(False)
            optimizer.state.pop(params[name], None)
        if kind == "gpt2" and any(".wpe." in name for name in frozen_at.get(step, [])):  # the front's use of the tied weight is cut
            model.transformer.wte.register_forward_hook(lambda m, a, out: out.detach())
        live = [p for p in params.values() if p.requires_grad]
        total = [torch.zeros_like(p) for p in live]
        for rank in (0, 1):
            for t, g in zip(total, torch.autograd.grad(loss_of(model, kind, step, rank), live), strict=True):
                t += g / 2
        optimizer.zero_grad()
        for p, t in zip(live, total, strict=True):
            p.grad = noise(step, t)
        optimizer.step()
        history.append(torch.cat([p.detach().view(-1) for p in params.values()]))
    return torch.stack(history)


def full(model: nn.Module) -> Tensor:
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return torch.cat([p.detach().view(-1) for p in model.parameters()])


def engine_for(model: nn.Module, stage: int, **smartfrz: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "weight_decay": oracle.DECAY, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "smartfrz": {"policy": "manual", **smartfrz},
    }
    return smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


class Calls:
    """Counts how often each block runs forward: in the forward itself and in recomputation; and which frozen ones see a backward."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.runs = [0] * len(blocks)
        self.gradients = [0] * len(blocks)
        for i, block in enumerate(blocks):
            first = next(m for m in block.modules() if next(m.parameters(recurse=False), None) is not None)
            first.register_forward_pre_hook(lambda m, a, i=i: self._run(i))
            first.register_full_backward_hook(lambda m, gi, go, i=i: self._gradient(i))

    def _run(self, i: int) -> None:
        self.runs[i] += 1

    def _gradient(self, i: int) -> None:
        self.gradients[i] += 1

    def take(self) -> dict[str, list[int]]:
        seen = {"runs": self.runs, "gradients": self.gradients}
        self.runs, self.gradients = [0] * len(self.runs), [0] * len(self.gradients)
        return seen


def blocks_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def case(
    kind: str,
    how: str,
    stage: int,
    smartfrz: dict[str, Any],
    chunk: int = 1,
    freezes: dict[int, list[int]] | None = None,
    rounded: bool = False,
) -> dict[str, Any]:
    """Train, freeze, and compare every step with the reference. how: the checkpointing. rounded: the engine's sums round otherwise."""
    model = build(kind) if kind in MODELS else net(how, chunk=chunk, inplace=kind == "inplace")
    model.train()
    if kind in MODELS and how != "none":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the name is deprecated in transformers 5
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
    calls = Calls(blocks_of(model))
    engine = engine_for(model, stage, **smartfrz)
    history, frozen_at, seen = [], {}, []
    for step in range(STEPS):
        if (positions := (freezes or FREEZES).get(step)) is not None:
            before = {n for n, p in model.named_parameters() if not p.requires_grad}
            engine.smartfrz.freeze([engine.smartfrz.layers[i] for i in positions])
            frozen_at[step] = [n for n, p in model.named_parameters() if not p.requires_grad and n not in before]
        calls.take()
        loss = loss_of(engine, kind, step, dist.get_rank())
        forward = calls.take()
        engine.backward(loss)
        engine.step()
        seen.append({"forward": forward["runs"], "recomputed": calls.runs[:], "gradients": calls.take()["gradients"]})
        history.append(full(model))
    expected = reference(kind, frozen_at)
    engine.destroy()
    return {
        "difference": [distance(*pair) for pair in zip(history, expected, strict=True)],
        "bound": spread(noisy(lambda noise: reference(kind, frozen_at, noise)), expected) if rounded else 0.0,
        "digest": hashlib.sha256(torch.stack(history).numpy().tobytes()).hexdigest(),
        "calls": seen,
        "frozen": list(engine.smartfrz.frozen),
    }


def spanning() -> dict[str, Any]:
    """Regions that grow after the freeze, over a frozen and an active block: the gradients are lost, and the check must say so before
    the step."""
    out = {}
    for stage in (0, 2, 3):
        model = net("torch-reentrant")
        engine = engine_for(model, stage)
        for step in range(2):
            engine.backward(loss_of(engine, "net", step, dist.get_rank()))
            engine.step()
        engine.smartfrz.freeze(engine.smartfrz.layers[:2])  # embeddings and blocks.0
        model.chunk = 2  # blocks.1 now shares a region with blocks.0
        before = full(model)
        engine.backward(loss_of(engine, "net", 2, dist.get_rank()))
        try:
            engine.step()
            error = {}
        except RuntimeError as caught:
            error = {"type": type(caught).__name__, "message": str(caught)}
        out[str(stage)] = error | {"moved": (full(model) - before).abs().max().item()}
    return out


def resumed(folder: str) -> dict[str, Any]:
    """A region over frozen and active blocks, in a process that has never seen a forward with nothing frozen."""
    out = {}
    for stage in (2, 3):
        history, frozen_at = [], {}
        for begin, end in ((0, 4), (4, STEPS)):
            model = net("torch-reentrant", chunk=2)
            engine = engine_for(model, stage)
            if begin:
                engine.load_checkpoint(f"{folder}/z{stage}")
            for step in range(begin, end):
                if step == 2:
                    engine.smartfrz.freeze(engine.smartfrz.layers[:2])
                    frozen_at[step] = [n for n, p in model.named_parameters() if not p.requires_grad]
                engine.backward(loss_of(engine, "net", step, dist.get_rank()))
                engine.step()
                history.append(full(model))
            engine.save_checkpoint(f"{folder}/z{stage}")
            engine.destroy()
        out[str(stage)] = (torch.stack(history) - reference("net", frozen_at)).abs().amax(1).tolist()
    return out


def late() -> dict[str, Any]:
    """Reentrant checkpointing that somebody turns on after the freeze."""
    model = net("none")
    engine = engine_for(model, 2)
    for step in range(5):
        if step == 2:
            engine.smartfrz.freeze(engine.smartfrz.layers[:2])
        if step == 4:
            model.region = torch_reentrant
        engine.backward(loss_of(engine, "net", step, dist.get_rank()))
        try:
            engine.step()
        except RuntimeError as caught:
            return {"step": step, "type": type(caught).__name__, "message": str(caught)}
    return {}


class Unused(oracle.Net):
    """Some weights are never used, a block is skipped now and then, and `cut` loses the gradients of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[3].unused = nn.Linear(3, 3)
        self.skip, self.cut = False, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for i, block in enumerate(self.blocks):
            if self.cut and i == 3:
                x = x.detach() + block(x).detach()
            elif not (self.skip and i == 4):
                x = block(x)
        return self.head(x)


def checks(stage: int) -> dict[str, Any]:
    """The gradient check without checkpointing: unused weights, blocks that come and go, a graph that is cut on one rank or on all."""
    out: dict[str, Any] = {}
    rank = dist.get_rank()

    def run(name: str, prepare: Callable[[Unused, int], None], steps: int = 5) -> None:
        model = Unused()
        engine = engine_for(model, stage)
        for step in range(steps):
            if step == 3:
                engine.smartfrz.freeze(["embeddings", "blocks.0"])
            prepare(model, step)
            engine.backward(loss_of(engine, "net", step, rank))
            hooks = sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())
            try:
                engine.step()
            except RuntimeError as caught:
                out[name] = {"step": step, "type": type(caught).__name__, "message": str(caught)}
                return
            out[name] = {"step": step, "hooks": hooks - sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())}

    def set_cut(model: Unused, step: int) -> None:
        model.cut = step >= 3

    def set_skip(model: Unused, step: int) -> None:
        model.skip = step in (1, 3)

    def set_skip_and_cut(model: Unused, step: int) -> None:
        model.skip, model.cut = step == 1, step >= 3

    run("unused", lambda model, step: None)
    run("cut", set_cut)
    run("skipped", set_skip)
    run("cut where blocks come and go", set_skip_and_cut, steps=16)
    return out


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for item in job:
            name = item.pop("name")
            function = item.pop("function", "case")
            if "freezes" in item:
                item["freezes"] = {int(k): v for k, v in item["freezes"].items()}
            functions = {"case": case, "spanning": spanning, "late": late, "checks": checks, "resumed": resumed}
            with ranks.case(name):
                ranks.write(folder, name, functions[function](**item))


if __name__ == "__main__":
    main()
