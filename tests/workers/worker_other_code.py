"""Code of others that switches requires_grad, and passes without gradients, on real 2-rank engines. Launched by test_other_code.py.

Every run is compared with one process in plain torch that freezes with requires_grad_(False) and keeps it so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import peft
import torch
import torch.distributed as dist
from reference import oracle, torch_models
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from workers import ranks

import smartfrz_ds

STEPS, FREEZE_AT, SWITCH_AT = 7, 2, 4
FROZEN = ["embeddings", "blocks.0", "blocks.1"]
STAGES = {"z0": 0, "z1": 1, "z2": 2, "z3": 3}
ADAMW = {"lr": oracle.LR, "weight_decay": oracle.DECAY}


class Run:
    """One model on one engine: "z0" to "z3" with DeepSpeed, "ddp", "fsdp2" or "fsdp1"."""

    def __init__(self, kind: str, net: nn.Module, **settings: Any) -> None:
        self.kind = kind
        section = {"policy": "manual", **settings}
        if kind in STAGES:
            config = {
                "train_micro_batch_size_per_gpu": oracle.BATCH,
                "gradient_clipping": 0.0,
                "steps_per_print": 10**9,
                "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
                "zero_optimization": {"stage": STAGES[kind]},
                "smartfrz": section,
            }
            live = [p for p in net.parameters() if p.requires_grad]
            self.model: Any = smartfrz_ds.initialize(model=net, model_parameters=live, config=config)[0]
            self.controller = self.model.smartfrz
        else:
            self.model = torch_models.wrap(kind, net)
            self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], **ADAMW)
            self.controller = smartfrz_ds.attach_torch(self.model, self.optimizer, section)
        inner = self.model.module if kind in STAGES else self.model
        self.params = {n.replace("_fsdp_wrapped_module.", "").removeprefix("module."): p for n, p in inner.named_parameters()}

    def backward(self, loss: Tensor) -> None:
        if self.kind in STAGES:
            self.model.backward(loss)
        else:
            loss.backward()

    def step(self) -> None:
        if self.kind in STAGES:
            self.model.step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights, by their name in the bare model."""
        if self.kind in STAGES:
            with deepspeed.zero.GatheredParameters([p for p in self.params.values() if hasattr(p, "ds_id")]):
                return {n: p.detach().clone() for n, p in self.params.items()}
        return torch_models.full(self.kind, self.model, self.params)

    def end(self) -> None:
        if self.kind in STAGES:
            self.model.destroy()
        else:
            self.controller.release()


def plain(net: nn.Module, loss_of: Callable[[nn.Module, int, int], Tensor], frozen_at: dict[int, list[str]]) -> list[dict[str, Tensor]]:
    """All weights after each step of both ranks' batches in this process. frozen_at: step -> what is frozen from it on."""
    params = {n: p for n, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), **ADAMW)
    off: set[str] = set()
    history = []
    for step in range(STEPS):
        off = set(frozen_at.get(step, off))
        for name in off:
            optimizer.state.pop(params[name], None)
        total = {n: torch.zeros_like(p) for n, p in params.items() if n not in off}
        for rank in (0, 1):
            loss = loss_of(net, step, rank)
            gradients = torch.autograd.grad(loss, [params[n] for n in total], allow_unused=True)
            for n, g in zip(total, gradients, strict=True):
                if g is not None:
                    total[n] += g / 2
        for n, p in params.items():
            p.grad = total.get(n)
        optimizer.step()
        history.append({n: p.detach().clone() for n, p in net.named_parameters()})
    return history


def apart(run: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max((run[n] - w).abs().max().item() for n, w in expected.items())


def net_loss(model: Any, step: int, rank: int) -> Tensor:
    return oracle.loss_of(model, *oracle.data(step, 0, rank), "fp32")


# --- what other code does: called before the forward of a step ------------------------------------------------------------------------


def nothing(run: Run, step: int) -> None:
    pass


def everything_on(run: Run, step: int) -> None:
    """model.requires_grad_(True), once."""
    if step == SWITCH_AT:
        run.model.requires_grad_(True)


def schedule(run: Run, step: int) -> None:
    """A schedule of somebody's that sets what should train, in every step."""
    if step >= SWITCH_AT:
        for n, p in run.params.items():
            p.requires_grad_("blocks.0" in n or "blocks.1" in n or p.requires_grad)


def unfreezing_callback(run: Run, step: int) -> None:
    """One layer a step, front to back, with model.train() as most have it."""
    run.model.train()
    if step >= SWITCH_AT:
        for n, p in run.params.items():
            if f"blocks.{step - SWITCH_AT}." in n:
                p.requires_grad_(True)


def then_freezes_more(run: Run, step: int) -> None:
    """Flags are on while the layout changes."""
    if step >= SWITCH_AT:
        run.model.requires_grad_(True)
    if step == SWITCH_AT + 1:
        run.controller.freeze(["blocks.2"])


SWITCHES = {f.__name__: f for f in (nothing, everything_on, schedule, unfreezing_callback, then_freezes_more)}


def switched(kind: str, switch: str) -> dict[str, Any]:
    """Train, freeze, let other code switch flags on, and look at what was computed and what moved."""
    run = Run(kind, oracle.Net())
    computed = [0] * STEPS
    now = 0
    in_front = [n for n in run.params if oracle.layer_of(n) in FROZEN]

    def count(param: Any) -> None:
        computed[now] += 1

    for n in in_front:
        run.params[n].register_post_accumulate_grad_hook(count)
    difference = []
    frozen_at = {FREEZE_AT: in_front}
    if switch == "then_freezes_more":
        frozen_at[SWITCH_AT + 1] = [*in_front, *(n for n in run.params if oracle.layer_of(n) == "blocks.2")]
    expected = plain(oracle.Net(), net_loss, frozen_at)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            now = step
            if step == FREEZE_AT:
                run.controller.freeze(FROZEN)
            SWITCHES[switch](run, step)
            run.backward(net_loss(run.model, step, dist.get_rank()))
            run.step()
            difference.append(apart(run.weights(), expected[step]))
    off = run.controller.backend.frozen
    report = run.controller.report()
    out = {
        "difference": difference,
        "computed": computed,
        "on": sum(p.requires_grad for p in off),
        "held": sum(p.grad is not None for p in off),
        "saved": report.saved_flops_fraction,
        "events": [e.message for e in report.events if e.kind == "warning"],
        "warned": sum("requires_grad" in str(w.message) and "smartfrz" in str(w.message) for w in caught),
        "hooks": max(len(run.params[n]._post_accumulate_grad_hooks or {}) for n in in_front),
    }
    run.end()
    return out | {"hooks after": max(len(run.params[n]._post_accumulate_grad_hooks or {}) for n in in_front)}


# --- PEFT -----------------------------------------------------------------------------------------------------------------------------


def lora() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], lora_dropout=0.0, init_lora_weights=False)
        return peft.get_peft_model(GPT2LMHeadModel(config), settings).train()


def dpo(kind: str, order: str) -> dict[str, Any]:
    """A policy and its reference in one model, the reference without adapters and without gradients; and a set_adapter now and then."""

    def loss_of(model: Any, step: int, rank: int, bare: Any = None) -> Tensor:
        bare = model if bare is None else bare
        tokens = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))

        def reference() -> Tensor:
            with torch.no_grad(), bare.disable_adapter():
                return model(input_ids=tokens).logits

        if order == "reference first":
            base = reference()
            return (model(input_ids=tokens).logits - base).square().mean()
        logits = model(input_ids=tokens).logits
        return (logits - reference()).square().mean()

    bare = lora()
    run = Run(kind, bare)
    front = [x for x in run.controller.layers if x.endswith(("embeddings", ".h.0"))]
    expected = plain(lora(), loss_of, {FREEZE_AT: [n for n, p in lora().named_parameters() if p.requires_grad and ".h.0." in n]})
    difference, held = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if step == FREEZE_AT:
                run.controller.freeze(front)
            if step == SWITCH_AT:
                bare.set_adapter("default")
            run.backward(loss_of(run.model, step, dist.get_rank(), bare))
            run.step()
            held.append(sum(p.grad is not None for p in run.controller.backend.frozen))
            difference.append(apart(run.weights(), expected[step]))
    out = {
        "difference": difference,
        "held": held,
        "frozen": len(run.controller.backend.frozen),
        "warned": [str(w.message) for w in caught if "smartfrz" in str(w.message)],
    }
    run.end()
    return out


# --- two engines ----------------------------------------------------------------------------------------------------------------------


def gan(kind: str) -> dict[str, Any]:
    """The generator's backward goes through the discriminator, and leaves gradients there that no step uses."""
    run = Run(kind, oracle.Net())
    fake = nn.Linear(3, oracle.INPUTS)
    rank = dist.get_rank()
    said = ""
    differences = []
    expected = plain(oracle.Net(), net_loss, {3: ["inp.weight", "inp.bias"]})
    for step in range(STEPS):
        if step == 3:
            noise = torch.randn(oracle.BATCH, 3)
            run.model(fake(noise)).square().mean().backward()  # DeepSpeed's engines take a plain backward from stage 1 on
            try:
                run.controller.freeze(["embeddings"])
            except RuntimeError as error:
                said = str(error)
            run.controller.drop_gradients()
            run.controller.freeze(["embeddings"])
        run.backward(net_loss(run.model, step, rank))
        run.step()
        differences.append(apart(run.weights(), expected[step]))
    run.end()
    return {"said": said, "difference": differences}


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for item in job:
            name, function = item.pop("name"), item.pop("function")
            with ranks.case(name):
                ranks.write(folder, name, {"switched": switched, "dpo": dpo, "gan": gan}[function](**item))


if __name__ == "__main__":
    main()
