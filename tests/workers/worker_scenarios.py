"""Scenarios on real 2-rank engines, each a function that returns what it saw. Launched by test_scenarios.py, one launch for all."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from reference import oracle
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from workers import ranks

import smartfrz_ds
from smartfrz_ds.bench.memory import held_bytes, reset_peak
from smartfrz_ds.bench.wire import CollectiveBytes
from smartfrz_ds.model.view import View
from smartfrz_ds.policies.base import Decision
from smartfrz_ds.signals.snapshots import sample_indices, sampled_params

HALF = ["embeddings", "blocks.0", "blocks.1", "blocks.2"]
ENGINES: dict[str, dict[str, Any]] = {
    "z0-fp32": {"zero_optimization": {"stage": 0}},
    "z0-bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "z1-fp32": {"zero_optimization": {"stage": 1}},
    "z1-bf16opt": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "z2-fp32": {"zero_optimization": {"stage": 2}},
    "z2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
}


class Wide(nn.Module):
    """Six equal blocks that hold nearly all weights; layers: blocks.0 .. blocks.5, with embeddings and head of almost nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(oracle.INPUTS, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width)) for _ in range(6))
        self.head = nn.Linear(width, oracle.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def make(model: nn.Module, engine: str = "z2-fp32", smartfrz: dict[str, Any] | None = None, **config: Any) -> Any:
    """A freezing engine with AdamW and no clipping."""
    base = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "weight_decay": oracle.DECAY, "torch_adam": True}},
        "smartfrz": {"policy": "manual", "order": "any"} if smartfrz is None else smartfrz,
    }
    settings = base | {k: dict(v) for k, v in ENGINES[engine].items()} | config
    settings["zero_optimization"] = settings["zero_optimization"] | {"reduce_bucket_size": 10**7, "allgather_bucket_size": 10**7}
    return smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=settings)[0]


def train(engine: Any, step: int) -> None:
    dtype = "bf16" if engine.bfloat16_enabled() else "fp32"
    x, y = oracle.data(step, 0, dist.get_rank())
    engine.backward(oracle.loss_of(engine, x, y, dtype))
    engine.step()


def caught(action: Callable[[], Any]) -> dict[str, str]:
    try:
        action()
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {}


# --- scenarios -------------------------------------------------------------------------------------------------------------------


def bytes_on_the_wire(name: str) -> dict[str, Any]:
    """Bytes reduced and gathered a step, before and after half of the weights freeze."""
    model = Wide(32)
    engine = make(model, name)
    train(engine, 0)
    with WIRE.counted() as before:
        train(engine, 1)
    engine.smartfrz.freeze(HALF)
    train(engine, 2)
    with WIRE.counted() as after:
        train(engine, 3)
    active = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"before": dict(before), "after": dict(after), "share": active / sum(p.numel() for p in model.parameters())}


def memory_of_a_freeze(name: str) -> dict[str, Any]:
    """Resident bytes before, at the peak of, and after a freeze of half of 10 M weights, and what the freeze is checked for."""
    model = Wide(456)
    engine = make(model, name)
    for step in range(2):
        train(engine, step)
    gc.collect()
    half = [p for n, p in model.named_parameters() if oracle.layer_of(n) in HALF]
    need = engine.smartfrz.backend.memory_need(half, (), keep=False)
    before, state_before = held_bytes(engine.device), engine.smartfrz.report().optimizer_bytes
    reset_peak(engine.device)
    engine.smartfrz.freeze(HALF)
    gc.collect()
    peak, after, report = held_bytes(engine.device, peak=True), held_bytes(engine.device), engine.smartfrz.report()
    out = {
        "rise": peak - before,
        "need": need.host + need.device,
        "fall": before - after,
        "state_before": state_before,
        "state_after": report.optimizer_bytes,
        "released": report.events[-1].bytes_released,
        "share": sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(p.numel() for p in model.parameters()),
    }
    engine.destroy()
    del engine, model, report
    gc.collect()
    return out


def naive_against_ours() -> dict[str, Any]:
    """Largest movement of frozen weights in eight steps after requires_grad_(False), and after ours; ZeRO-2, AdamW with decay."""
    out = {}
    for way in ("naive", "ours"):
        model = oracle.Net()
        engine = make(model)
        for step in range(4):
            train(engine, step)
        front = [p for n, p in model.named_parameters() if oracle.layer_of(n) in ("embeddings", "blocks.0", "blocks.1")]
        before, bytes_before = [p.detach().clone() for p in front], engine.smartfrz.report().optimizer_bytes
        if way == "naive":
            for p in front:
                p.requires_grad_(False)
        else:
            engine.smartfrz.freeze(["embeddings", "blocks.0", "blocks.1"])
        for step in range(4, 12):
            train(engine, step)
        out[way] = {
            "drift": max((p - q).abs().max().item() for p, q in zip(front, before, strict=True)),
            "released": bytes_before - engine.smartfrz.report().optimizer_bytes,
        }
    return out


def tied_gpt2(engine_name: str, tied: str) -> dict[str, Any]:
    """GPT-2 with its input embedding and head tied: the front freezes at step 3, a block more at step 5."""
    model = gpt2()
    engine = make(model, engine_name, {"policy": "manual", "tied": tied})
    history = []
    for step in range(8):
        if step == 3:
            engine.smartfrz.freeze(engine.smartfrz.layers[:2])
        if step == 5:
            engine.smartfrz.freeze(engine.smartfrz.layers[2:3])
        tokens = gpt2_tokens(step, dist.get_rank())
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        history.append({n: p.detach().clone() for n, p in model.named_parameters()})
    expected = gpt2_reference(tied, engine.smartfrz.layers)
    worst = max((a[n] - b[n]).abs().max().item() for a, b in zip(history, expected, strict=True) for n in a)
    wte = "transformer.wte.weight"
    return {
        "worst": worst,
        "wte_moved": (history[-1][wte] - history[2][wte]).abs().max().item(),
        "front_moved": (history[-1]["transformer.h.0.mlp.c_fc.weight"] - history[2]["transformer.h.0.mlp.c_fc.weight"]).abs().max().item(),
        "layers": list(engine.smartfrz.layers),
    }


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    model.train()
    return model


def gpt2_tokens(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 50, (oracle.BATCH, 12), generator=torch.Generator().manual_seed(100 * step + rank))


def gpt2_reference(tied: str, layers: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    """One process, plain torch: the frozen front's use of the shared weight gives no gradient, with tied=freeze the weight stops too."""
    model = gpt2()
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
    history = []
    for step in range(8):
        if step in (3, 5):
            blocks = ["transformer.h.0."] if step == 3 else ["transformer.h.1."]
            front = ["transformer.wpe."] + (["transformer.wte."] if tied == "freeze" else []) if step == 3 else []
            for name, p in params.items():
                if any(name.startswith(x) for x in (*blocks, *front)):
                    p.requires_grad_(False)
                    p.grad = None
                    optimizer.state.pop(p, None)
            if step == 3:
                model.transformer.wte.register_forward_hook(lambda m, a, out: out.detach())
        optimizer.zero_grad()
        losses = []
        live = [p for p in params.values() if p.requires_grad]
        total = [torch.zeros_like(p) for p in live]
        for rank in (0, 1):
            tokens = gpt2_tokens(step, rank)
            losses.append(model(input_ids=tokens, labels=tokens).loss)
            for t, g in zip(total, torch.autograd.grad(losses[-1], live), strict=True):
                t += g / 2
        for p, t in zip(live, total, strict=True):
            p.grad = t
        optimizer.step()
        history.append({n: p.detach().clone() for n, p in params.items()})
    return history


def snapshots_are_the_weights() -> dict[str, Any]:
    """On rank 0, the largest difference between a snapshot and the full master weights at its indices; also after a freeze and a thaw."""
    out = {}
    for name in ENGINES:
        model = oracle.Net()
        engine = make(model, name, {"policy": "manual", "order": "any", "sample_size": 100, "seed": 5})
        controller = engine.smartfrz
        worst, rounded = 0.0, False
        for step in range(4):
            if step == 2:
                controller.freeze(["blocks.1"])
            if step == 3:
                controller.thaw(["blocks.1"])
            train(engine, step)
            with WIRE.counted() as sent:
                values = controller._recording.snapshots.take()
            for layer in controller._run.layers:
                params = sampled_params(layer)
                if layer.name in controller.frozen or layer.kind == "head":
                    continue
                full = torch.cat([master_of(engine, p).view(-1) for p in params])
                low = torch.cat([p.detach().float().view(-1) for p in params])
                chosen = sample_indices(full.numel(), 100, torch.Generator().manual_seed((5 * 1_000_003 + layer.position) % 2**63))
                if values is not None:
                    worst = max(worst, (values[layer.position] - full[chosen]).abs().max().item())
                    rounded = rounded or not torch.equal(values[layer.position], low[chosen])
        out[name] = {"worst": worst, "finer_than_weights": rounded, "bytes": sum(sent.values()), "layers": len(controller.layers)}
    return out


def master_of(engine: Any, p: nn.Parameter) -> torch.Tensor:
    """The full fp32 master of a parameter, by DeepSpeed's public accessor; of stage 0 by its wrapper's pairs."""
    if engine.zero_optimization_stage() > 0:
        return safe_get_full_fp32_param(p)
    if engine.bfloat16_enabled():
        wrapper = engine.optimizer
        pairs = zip((q for g in wrapper.fp16_groups for q in g), (m for g in wrapper.fp32_groups for m in g), strict=True)
        return next(m.detach() for q, m in pairs if q is p)
    return p.detach()


def not_at_a_boundary() -> dict[str, Any]:
    """Freezing between backward and step, and in mid-accumulation."""
    out = {}
    for name in ENGINES:
        for accumulation in (1, 2):
            model = oracle.Net()
            engine = make(model, name, gradient_accumulation_steps=accumulation)
            train(engine, 0)
            if accumulation == 2:
                early = caught(lambda e=engine: e.smartfrz.freeze(["blocks.0"]))
                train(engine, 0)
            x, y = oracle.data(1, 0, dist.get_rank())
            engine.backward(oracle.loss_of(engine, x, y, "bf16" if engine.bfloat16_enabled() else "fp32"))
            late = caught(lambda e=engine: e.smartfrz.freeze(["blocks.0"]))
            engine.step()
            if accumulation == 2:
                train(engine, 1)
            ok = caught(lambda e=engine: e.smartfrz.freeze(["blocks.0"]))
            out[f"{name}-{accumulation}"] = {"late": late, "early": early if accumulation == 2 else late, "at_boundary": ok}
    return out


def wrong_requests() -> dict[str, Any]:
    """freeze and thaw with names, orders and sets that are not allowed."""
    engine = make(oracle.Net(), smartfrz={"policy": "manual", "keep_active": ["blocks.3"]})
    controller = engine.smartfrz
    train(engine, 0)
    out = {
        "unknown": caught(lambda: controller.freeze(["blocks.9"])),
        "gap": caught(lambda: controller.freeze(["blocks.1"])),
        "kept": caught(lambda: controller.freeze(["embeddings", "blocks.0", "blocks.1", "blocks.2", "blocks.3"])),
        "good": caught(lambda: controller.freeze(["embeddings", "blocks.0", "blocks.1"])),
        "thaw_front": caught(lambda: controller.thaw(["embeddings"])),
        "thaw_back": caught(lambda: controller.thaw(["blocks.1"])),
        "different": caught(lambda: controller.freeze(["blocks.1"] if dist.get_rank() == 0 else ["blocks.1", "blocks.2"])),
        "one_unknown": caught(lambda: controller.freeze(["blocks.1"] if dist.get_rank() == 0 else ["nonsense"])),
        "frozen": list(controller.frozen),
    }
    everything = make(oracle.Net())
    out["everything"] = caught(lambda: everything.smartfrz.freeze(everything.smartfrz.layers))
    return out


def different_settings() -> dict[str, Any]:
    """Ranks that were started with different settings."""
    return caught(lambda: make(oracle.Net(), smartfrz={"policy": "manual", "freeze_interval": 50 + dist.get_rank()}))


QUICK = {"snapshot_interval": 1, "freeze_interval": 2, "warmup_steps": 0, "window": 12}


def linear_policy(order: str) -> dict[str, Any]:
    settings = QUICK | {
        "policy": "linear",
        "order": order,
        "max_frozen_fraction": 0.6,
        "cooldown": 0,
        "linear": {"start_step": 4, "end_step": 16},
    }
    engine = make(oracle.Net(), smartfrz=settings)
    seen = []
    for step in range(20):
        train(engine, step)
        seen.append(list(engine.smartfrz.frozen))
    return {"frozen": seen, "events": [[e.kind, e.step, list(e.layers)] for e in engine.smartfrz.report().events]}


def dry_run() -> dict[str, Any]:
    settings = QUICK | {"policy": "linear", "dry_run": True, "linear": {"start_step": 2, "end_step": 8}}
    engine = make(oracle.Net(), smartfrz=settings)
    train(engine, 0)
    before = engine.smartfrz.report().optimizer_bytes
    for step in range(1, 10):
        train(engine, step)
    report = engine.smartfrz.report()
    return {
        "frozen": list(report.frozen),
        "wanted": [list(e.layers) for e in report.events if e.kind == "decision"],
        "dry": all(e.dry_run for e in report.events if e.kind == "decision"),
        "bytes": report.optimizer_bytes - before,
        "trainable": all(p.requires_grad for p in engine.module.parameters()),
    }


class FailingPolicy:
    """A policy of a user's own that breaks."""

    name = "failing"
    needs: frozenset[Any] = frozenset({"weights"})

    def decide(self, view: View) -> Decision:
        raise ZeroDivisionError("a bug in somebody's policy")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def failing_policy() -> dict[str, Any]:
    engine = make(oracle.Net(), smartfrz=QUICK | {"policy": "linear", "linear": {"start_step": 1, "end_step": 2}})
    engine.smartfrz._policy_stage.policy = FailingPolicy()
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        for step in range(8):
            train(engine, step)
    mine = [str(w.message) for w in caught_warnings if "smartfrz" in str(w.message)]
    return {"frozen": list(engine.smartfrz.frozen), "warnings": mine, "events": [e.message for e in engine.smartfrz.report().events]}


def nan_weights() -> dict[str, Any]:
    """Weights that turned NaN (stage 0 in fp32: the others skip such a step): the predictor must not judge them."""
    engine = make(oracle.Net(), "z0-fp32", smartfrz=QUICK | {"policy": "attention"})
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        for step in range(30):
            x, y = oracle.data(step, 0, dist.get_rank())
            loss = oracle.loss_of(engine, x, y, "fp32")
            engine.backward(loss * float("nan") if step == 6 else loss)
            engine.step()
    mine = [str(w.message) for w in caught_warnings if "smartfrz" in str(w.message)]
    broken = any(torch.isnan(p).any().item() for p in engine.module.parameters())
    return {"frozen": list(engine.smartfrz.frozen), "warnings": mine, "broken": broken}


def state_round_trip() -> dict[str, Any]:
    """A controller's state into the controller of another engine: the frozen set, the history, the policy's state."""
    settings = QUICK | {"policy": "linear", "linear": {"start_step": 2, "end_step": 12}, "max_frozen_fraction": 0.5}
    first = make(oracle.Net(), smartfrz=settings)
    for step in range(6):
        train(first, step)
    state = first.smartfrz.state_dict()
    second = make(oracle.Net(), smartfrz=settings)
    second.smartfrz.load_state_dict(state)
    third = make(Wide(8), smartfrz=settings)
    return {
        "frozen": list(first.smartfrz.frozen),
        "loaded": list(second.smartfrz.frozen),
        "step": second.smartfrz.step,
        "windows": len(state["history"]) if dist.get_rank() == 0 else len(second.smartfrz.state_dict()["history"]),
        "other_model": caught(lambda: third.smartfrz.load_state_dict(state)),
        "untouched": list(third.smartfrz.frozen),
    }


def refused_engines() -> dict[str, Any]:
    out = {}
    for name, config in {
        "deepcompile": {"compile": {"deepcompile": True}},
        "tied, not an embedding": {},
    }.items():
        model: nn.Module = oracle.Net()
        if name.startswith("tied"):
            model.head.weight = model.inp.weight = nn.Parameter(torch.zeros(1, 1))  # shapes don't matter: nothing runs
        out[name] = caught(lambda m=model, c=config: make(m, smartfrz={"policy": "manual"}, **c))
    off = make(oracle.Net(), smartfrz={"enabled": False})
    out["disabled"] = {"type": type(off).__name__, "message": ""}
    return out


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        naive_against_ours,
        snapshots_are_the_weights,
        not_at_a_boundary,
        wrong_requests,
        different_settings,
        dry_run,
        failing_policy,
        nan_weights,
        state_round_trip,
        refused_engines,
    )
}
SCENARIOS |= {f"linear_policy-{order}": lambda o=order: linear_policy(o) for order in ("front_to_back", "any")}
SCENARIOS |= {
    f"tied_gpt2-{e}-{t}": lambda e=e, t=t: tied_gpt2(e, t) for e in ("z0-fp32", "z1-fp32", "z2-fp32") for t in ("train", "freeze")
}
SCENARIOS |= {f"bytes_on_the_wire-{e}": lambda e=e: bytes_on_the_wire(e) for e in ENGINES}
SCENARIOS |= {f"memory_of_a_freeze-{e}": lambda e=e: memory_of_a_freeze(e) for e in ("z1-fp32", "z1-bf16opt", "z2-fp32", "z2-bf16")}


def main() -> None:
    global WIRE
    WIRE = CollectiveBytes()  # before the process group: DeepSpeed keeps some of the functions that it finds then
    with ranks.job() as (names, folder):
        for name in names:
            with ranks.case(name):
                ranks.write(folder, name, SCENARIOS[name]())


if __name__ == "__main__":
    main()
