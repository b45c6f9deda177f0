"""Mixture-of-experts models on two ranks, with the leaf modules that DeepSpeed makes of them. Launched by test_moe.py."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules
from deepspeed.utils.z3_leaf_module import unset_z3_leaf_modules
from reference import moe, oracle
from reference.bounds import distance, noisy, spread
from torch import Tensor, nn
from workers import ranks

import smartfrz_ds
from smartfrz_ds.cli.doctor_refusals import check_together

JUDGED = {
    "policy": "weight_drift",
    "weight_drift": {"threshold": 1.0, "start_step": 3},
    "warmup_steps": 0,
    "freeze_interval": 2,
    "cooldown": 0,
    "max_frozen_fraction": 0.6,
    "total_steps": 9,
    "window": 3,
}


def config(case: moe.Case) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "weight_decay": oracle.DECAY, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,  # an offloaded optimizer is torch's too
        # nothing is gathered ahead or kept: what a backward needs and does not have fails
        "zero_optimization": {
            "stage": case.stage,
            "reduce_bucket_size": 3000,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            **case.zero,
        },
        # raise: a doubt of the gradient check ends the run
        "smartfrz": {
            "policy": "manual",
            "order": "any",
            "layers": case.layers,
            "keep_state": case.keep_state,
            "gradient_check": "raise",
            "sample_size": 64,
            "snapshot_interval": 1,
        },
    }
    if case.plan == "judged":
        found["smartfrz"] |= JUDGED
    if case.dtype == "bf16":
        found["bf16"] = {"enabled": True}
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return {n: p.detach().float().flatten().clone() for n, p in model.named_parameters()}


def start(case: moe.Case, *, plugin: bool = True, seed: int = 0) -> Any:
    model = moe.build(case.kind, seed=seed, checkpointing=case.checkpointing)
    initialize = smartfrz_ds.initialize if plugin else deepspeed.initialize
    return initialize(model=model, model_parameters=list(model.parameters()), config=config(case))[0]


class Seen:
    """What a run showed: weights by step, optimizer bytes of this rank, and how far frozen weights moved."""

    def __init__(self) -> None:
        self.history: list[Tensor] = []
        self.bytes: list[int] = []
        self.frozen: list[list[str]] = []
        self.drift = 0.0


def train(engine: Any, case: moe.Case, first: int, *, folder: Path | None = None) -> Seen:
    seen, rank = Seen(), dist.get_rank()
    plugin = hasattr(engine, "smartfrz")
    for step in range(first, case.steps):
        if plugin and (event := case.at(step)):
            before = weights(engine.module)
            getattr(engine.smartfrz, event[0])(event[1])
            after = weights(engine.module)
            assert all(torch.equal(before[n], after[n]) for n in before), "a change of the layout moved weights"
        held = {n for n, p in engine.module.named_parameters() if not p.requires_grad}
        before = weights(engine.module)
        for micro in range(case.accumulation):
            engine.backward(moe.loss_of(engine, case, step, micro, rank))
            engine.step()
        now = weights(engine.module)
        seen.drift = max([seen.drift, *((now[n] - before[n]).abs().max().item() for n in held)])
        seen.history.append(torch.cat(list(now.values())))
        if plugin:
            seen.bytes.append(engine.smartfrz.report().optimizer_bytes)
            seen.frozen.append(list(engine.smartfrz.frozen))
            expected = {n for n in now if moe.layer_of(n, case.layers) in engine.smartfrz.frozen}
            assert held == expected, (held, expected)
        if folder is not None and step + 1 in case.saves:
            engine.save_checkpoint(str(folder))
    return seen


def apart(a: list[Tensor], b: list[Tensor]) -> list[float]:
    return [(x - y).abs().max().item() for x, y in zip(a, b, strict=True)]


_expected: dict[Any, list[Tensor]] = {}


def expected(case: moe.Case, *, freezes: bool) -> list[Tensor]:
    key = (case.kind, case.plan if freezes else "", case.dtype, case.clip, case.accumulation, case.keep_state, case.auxiliary, case.steps)
    if key not in _expected:
        _expected[key] = moe.reference(case, freezes=freezes)
    return _expected[key]


_own: dict[Any, list[float]] = {}


def own(case: moe.Case) -> list[float]:
    """How far DeepSpeed alone, with nothing frozen, is from one process with nothing frozen."""
    key = (case.kind, case.stage, case.dtype, case.clip, case.accumulation, case.auxiliary, case.checkpointing, str(case.zero))
    if key not in _own:
        plain = start(case, plugin=False)
        _own[key] = apart(train(plain, case, 0).history, expected(case, freezes=False))
        plain.destroy()
        gc.collect()
    return _own[key]


def run(case: moe.Case, folder: Path) -> dict[str, Any]:
    """apart: from one process with the same freezes; control: how far that is from one process with nothing frozen; see `own`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine = start(case)
        seen = train(engine, case, 0, folder=folder)
    controller = engine.smartfrz
    sizes = dict.fromkeys(controller.layers, 0)
    for name, p in engine.module.named_parameters():
        sizes[moe.layer_of(name, case.layers)] += getattr(p, "ds_numel", p.numel())
    facts: dict[str, Any] = {
        "leaves": len(get_z3_leaf_modules(engine.module)),
        "bytes": seen.bytes,
        "frozen": seen.frozen,
        "drift": seen.drift,
        "saved": controller.report().saved_flops_fraction,
        "idle": sum(m.idle for m in engine.module.modules() if isinstance(m, moe.ListedSparseBlock)),
        "sizes": sizes,
        "said": [str(w.message) for w in said if "smartfrz" in f"{w.message} {w.filename}"],
        "apart": apart(seen.history, expected(case, freezes=True)),
        "control": apart(expected(case, freezes=True), expected(case, freezes=False)),
        "resumed": {},
    }
    engine.destroy()
    for k in case.saves:
        other = start(case, seed=1)
        other.load_checkpoint(str(folder), tag=f"global_step{k}")
        again = train(other, case, k)
        facts["resumed"][k] = [max(apart(again.history, seen.history[k:])), again.frozen == seen.frozen[k:], again.drift]
        other.destroy()
    gc.collect()
    whole = torch.stack(expected(case, freezes=True))
    facts["distance"] = distance(torch.stack(seen.history), whole)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    exact = case.stage < 3 and case.dtype == "fp32" and not case.clip
    facts["bound"] = (
        0.0
        if exact
        else spread([torch.stack(s) for s in noisy(lambda n: moe.reference(case, freezes=True, noise=n), dtype=dtype)], whole, dtype)
    )
    return facts | {"own": own(case)}


def judged(case: moe.Case) -> dict[str, Any]:
    """A policy decides by snapshots. Returns what froze, and the layers whose last sample is not of their weights."""
    engine = start(case)
    seen = Seen()
    for step in range(case.steps):
        before = weights(engine.module)
        held = {n for n, p in engine.module.named_parameters() if not p.requires_grad}
        engine.backward(moe.loss_of(engine, case, step, 0, dist.get_rank()))
        engine.step()
        now = weights(engine.module)
        seen.drift = max([seen.drift, *((now[n] - before[n]).abs().max().item() for n in held)])
        seen.frozen.append(list(engine.smartfrz.frozen))
    sampled = {name: window["weights"][-1] for name, window in engine.smartfrz.state_dict()["history"].items()}
    whole = {name: torch.cat([w for n, w in now.items() if moe.layer_of(n, case.layers) == name]) for name in sampled}
    foreign = [name for name, sample in sampled.items() if not torch.isin(sample, whole[name]).all()]
    engine.destroy()
    return {"frozen": seen.frozen, "drift": seen.drift, "sampled": len(sampled), "foreign": foreign, "layers": len(engine.smartfrz.layers)}


# --- starts ------------------------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
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


def begin(model: nn.Module, stage: int, *, marked: type | None = None, unmarked: type | None = None, **zero: Any) -> str:
    """The error of a start; empty where it starts, freezes and steps."""
    case = moe.Case("start", "", stage, "none", zero=zero)
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config(case))[0]
    if marked is not None:
        set_z3_leaf_modules(model, [marked])
    if unmarked is not None:
        unset_z3_leaf_modules(model, [unmarked])
    try:
        smartfrz_ds.attach(engine)
    except ValueError as error:
        return str(error)
    finally:
        if not hasattr(engine, "smartfrz"):
            engine.destroy()
    engine.smartfrz.freeze(engine.smartfrz.layers[:2])
    for step in range(2):
        if isinstance(model, Toy):
            loss = oracle.loss_of(engine, *oracle.data(step, 0, dist.get_rank()), "fp32")
        else:
            loss = moe.loss_of(engine, case, step, 0, dist.get_rank())
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return ""


def starts() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in ("Mixtral", "Qwen2Moe", "Qwen3Moe"):
        out[f"doctor, {kind}"] = [f.text for f in check_together(moe.build(kind), config(moe.Case("", kind, 3, "none")))]
    own = type(moe.build("Mixtral").model.layers[0].mlp)
    out["user's class"] = begin(moe.build("Mixtral"), 3, leaf_module={"classes": [own.__name__]})
    out["user's names"] = begin(moe.build("Mixtral"), 3, leaf_module={"classes": [], "names": ["model.layers.1.mlp"]})
    out["user's suffixes"] = begin(moe.build("Mixtral"), 3, leaf_module={"classes": [], "name_suffixes": [".mlp"]})
    out["no leaf modules"] = begin(moe.build("Mixtral"), 3, leaf_module={"classes": []})
    out["user's class, stage 2"] = begin(moe.build("Mixtral"), 2, leaf_module={"classes": [own.__name__]})
    called = Toy()
    set_z3_leaf_modules(called, [Routed])
    out["script's call"] = begin(called, 3)
    out["script's call after initialize"] = begin(Toy(), 3, marked=Routed)
    taken_back = Toy()
    set_z3_leaf_modules(taken_back, [Routed])
    out["taken back after initialize"] = begin(taken_back, 3, unmarked=Routed)
    out["by size"] = begin(Toy(), 3, stage3_module_granularity_threshold=10**6)
    return out


def main() -> None:
    with ranks.job() as (job, folder):
        for item in job["cases"]:
            case = moe.Case(**item | {"saves": tuple(item["saves"])})
            with ranks.case(case.name):
                ranks.write(folder, case.name, judged(case) if case.plan == "judged" else run(case, folder / case.name))
        if job["starts"]:
            with ranks.case("starts"):
                ranks.write(folder, "starts", starts())


if __name__ == "__main__":
    main()
