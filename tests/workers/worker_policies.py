"""Policies on real 2-rank engines: what they are given, and what they do with it. Launched by test_policies_run.py, one launch for all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from reference import oracle
from reference.bounds import rounding
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import full

import smartfrz_ds
from smartfrz_ds.model.view import View
from smartfrz_ds.policies.base import Decision

PROBE = 6  # inputs


def probe_batch(dtype: str = "fp32") -> torch.Tensor:
    x = torch.randn(9, oracle.INPUTS, generator=torch.Generator().manual_seed(77))
    return {"bf16": x.bfloat16(), "fp16": x.half()}.get(dtype, x)


def engine_of(stage: int, smartfrz: dict[str, Any], *, dtype: str = "fp32", groups: str = "one", **config: Any) -> Any:
    """An engine of the oracle's net, AdamW, a scheduler that computes its next rate from the current one. groups: one, or none given."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "weight_decay": oracle.DECAY, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
        "smartfrz": {"warmup_steps": 0, "freeze_interval": 1, "snapshot_interval": 1, "cooldown": 0, "sample_size": 64, **smartfrz},
        **config,
    }
    if dtype != "fp32":
        settings.setdefault(dtype, {"enabled": True})
    model = oracle.Net()
    parameters = {} if groups == "none" else {"model_parameters": list(model.parameters())}
    batch = {"probe_batch": probe_batch(dtype)} if smartfrz.get("probe") else {}
    return smartfrz_ds.initialize(
        model=model, config=settings, lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95), **parameters, **batch
    )[0]


def loss_of(engine: Any, step: int, micro: int, dtype: str) -> torch.Tensor:
    x, y = oracle.data(step, micro, dist.get_rank())
    if dtype == "fp16":
        return torch.nn.functional.cross_entropy(engine(x.half()).float(), y)
    return oracle.loss_of(engine, x, y, dtype)


def train_step(engine: Any, step: int, dtype: str = "fp32", accumulation: int = 1) -> None:
    for micro in range(accumulation):
        engine.backward(loss_of(engine, step, micro, dtype))
        engine.step()


class Watching:
    """A policy that is asked in another one's place, keeps the views and hands the question on, or (None) freezes nothing."""

    def __init__(self, inner: Any, obey: bool = True) -> None:
        self.inner, self.obey = inner, obey
        self.name, self.needs = inner.name, inner.needs
        self.views: list[View] = []

    def decide(self, view: View) -> Decision:
        self.views.append(view)
        decision = self.inner.decide(view)
        return decision if self.obey else Decision()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def watch(engine: Any, obey: bool = True) -> list[View]:
    """The views of all freezing stages from now on, on rank 0."""
    watching = engine.smartfrz._policy_stage.policy = Watching(engine.smartfrz._policy_stage.policy, obey)
    return watching.views


def tensors_of(views: list[View]) -> dict[str, torch.Tensor]:
    out = {}
    for view in views:
        for name, gradient in view.gradients.items():
            out[f"{view.step}/gradient/{name}"] = gradient
        for name, gram in view.grams.items():
            out[f"{view.step}/gram/{name}"] = gram
        for name, window in view.windows.items():
            out[f"{view.step}/weights/{name}"] = window.weights[-2:].clone()  # windows are views of one storage
            out[f"{view.step}/lr_spent/{name}"] = window.lr_spent
    return {key: value.contiguous() for key, value in out.items()}


def save(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        save_file(tensors, folder / f"{name}.safetensors")


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.float().view(-1) for p in full(model).values()])


# --- the cases ------------------------------------------------------------------------------------------------------------------


def gradients(name: str, folder: Path, stage: int, dtype: str = "fp32", accumulation: int = 1, **config: Any) -> dict[str, Any]:
    """8 steps with a stage every 4, nothing is frozen. fp16: the loss scale overflows in the first attempts, those steps are skipped."""
    get_accelerator().is_fp16_supported = lambda: True  # torch computes fp16 on every CPU, see worker_guard.py
    smartfrz = {"policy": "autofreeze", "freeze_interval": 4}
    engine = engine_of(stage, smartfrz, dtype=dtype, gradient_accumulation_steps=accumulation, **config)
    views, weights, attempts = watch(engine, obey=False), [], 0
    while engine.smartfrz.step < 8:
        before = engine.smartfrz.step
        train_step(engine, before, dtype, accumulation)
        attempts += 1
        if engine.smartfrz.step > before:
            weights.append(flat(engine.module))
    tensors = tensors_of(views) | {"all weights": torch.stack(weights)}
    names = [n for n, _ in engine.module.named_parameters()]
    where = {id(p): n for n, p in engine.module.named_parameters()}
    for layer, requests in zip(engine.smartfrz.layers, engine.smartfrz._recording.snapshots.requests, strict=True):
        for r in requests:  # which weights are sampled
            tensors[f"elements/{layer}/{where[id(r.param)]}"] = torch.stack([r.elements, r.slots % 64])
    save(folder, name, tensors)
    engine.destroy()
    return {"stages": [view.step for view in views], "attempts": attempts, "names": names}


def probe(name: str, folder: Path, stage: int, dtype: str = "fp32", **config: Any) -> dict[str, Any]:
    """10 steps with a probe after each, two layers frozen at once with a probe at step 4: at the same stage."""
    engine = engine_of(
        stage, {"policy": "late", "late": {"start_step": 4}, "max_frozen_fraction": 0.3, "probe": PROBE}, dtype=dtype, **config
    )
    views, weights, parts = watch(engine), [], {}
    for step in range(10):
        train_step(engine, step, dtype)
        weights.append(flat(engine.module))
        assert all(m.training for m in engine.module.modules()) == (step < 3)  # frozen layers are in eval mode
        if stage == 0 or step in (2, 8):
            parts |= {f"{step + 1}/parameter/{n}": p for n, p in full(engine.module).items()}
    save(folder, name, tensors_of(views) | parts | {"all weights": torch.stack(weights)})
    out = {"frozen": list(engine.smartfrz.frozen), "events": [[e.kind, e.step, list(e.layers)] for e in engine.smartfrz.report().events]}
    engine.destroy()
    return out


def freezeout(name: str, folder: Path, stage: int, dtype: str = "fp32", resume: int = 0, **config: Any) -> dict[str, Any]:
    """12 steps of 12. resume: at this step a checkpoint is saved and another engine goes on from it."""
    smartfrz = {"policy": "freezeout", "total_steps": 12, "freezeout": {"t0": 0.4, "growth": "linear"}, "max_frozen_fraction": 1.0}
    engine = engine_of(stage, smartfrz, dtype=dtype, groups="none", **config)
    views, weights, seen = watch(engine), [], []
    # the watching policy stands for decide(); learning rates are asked of the policy itself
    for step in range(12):
        if resume and step == resume:
            engine.save_checkpoint(str(folder / name), tag="half")
            engine.destroy()
            engine = engine_of(stage, smartfrz, dtype=dtype, groups="none", **config)
            engine.load_checkpoint(str(folder / name), tag="half")
            views += watch(engine)
        train_step(engine, step, dtype)
        seen.append(engine.get_lr()[0])
        weights.append(flat(engine.module))
    tensors = tensors_of(engine.smartfrz._policy_stage.policy.views)
    save(folder, name, tensors | {"all weights": torch.stack(weights)})
    events = [[e.step, list(e.layers)] for e in engine.smartfrz.report().events if e.kind == "freeze"]
    out = {"lr": seen, "groups": len(engine.basic_optimizer.param_groups), "events": events}
    engine.destroy()
    return out


def policy(name: str, folder: Path, smartfrz: dict[str, Any], stage: int = 2, steps: int = 24) -> dict[str, Any]:
    """A policy at work, with all that it saw."""
    engine = engine_of(stage, {"total_steps": steps, **smartfrz})
    views = watch(engine)
    for step in range(steps):
        train_step(engine, step)
    save(folder, name, tensors_of(views))
    facts = [
        {"step": v.step, "frozen": list(v.frozen), "flops": [v.flops_full, v.flops_done], "profiled": v.profile is not None} for v in views
    ]
    report = engine.smartfrz.report()
    out = {
        "views": facts,
        "layers": [[i.name, i.kind, i.numel] for i in views[0].layers] if views else [],
        "events": [[e.kind, e.step, list(e.layers)] for e in report.events],
        "warnings": [e.message for e in report.events if e.kind == "warning"],
        "frozen": list(engine.smartfrz.frozen),
        "saved": report.saved_flops_fraction,
    }
    engine.destroy()
    return out


def resumed(name: str, folder: Path, stage: int) -> dict[str, Any]:
    """Gradients of an interval that a checkpoint cuts in two: saved after step 6, the stage is at step 8."""
    smartfrz = {"policy": "autofreeze", "freeze_interval": 4}
    engine = engine_of(stage, smartfrz)
    whole = watch(engine, obey=False)
    for step in range(8):
        if step == 6:
            engine.save_checkpoint(str(folder / name), tag="half")
        train_step(engine, step)
    engine.destroy()
    engine = engine_of(stage, smartfrz)
    engine.load_checkpoint(str(folder / name), tag="half")
    rest = watch(engine, obey=False)
    for step in range(6, 8):
        train_step(engine, step)
    engine.destroy()
    same = []
    for view in rest:
        for name, gradient in view.gradients.items():  # four steps of two ranks, added up in two parts
            other = whole[-1].gradients[name]
            same.append(bool((gradient - other).abs().max() <= rounding(4 * 2, float(other.abs().max()))))
    return {"stages": [view.step for view in rest], "same": same}


def thawed(name: str, folder: Path, stage: int) -> dict[str, Any]:
    """Layers frozen and thawed by hand within an interval have no number at its end, and one at the next."""
    engine = engine_of(stage, {"policy": "autofreeze", "freeze_interval": 4})
    views = watch(engine, obey=False)
    for step in range(12):
        if step == 5:
            engine.smartfrz.freeze(["embeddings", "blocks.0"])
        if step == 7:
            engine.smartfrz.thaw(["blocks.0"])
        train_step(engine, step)
    engine.destroy()
    return {"names": [sorted(view.gradients) for view in views]}


def refused(name: str, folder: Path) -> dict[str, str]:
    """What each start says that can't work."""

    def said(**kwargs: Any) -> str:
        try:
            engine_of(**kwargs)
        except ValueError as error:
            return str(error)
        return ""

    def in_a_pipeline(**smartfrz: Any) -> str:
        blocks = [torch.nn.Linear(oracle.WIDTH, oracle.WIDTH) for _ in range(4)]
        module = PipelineModule(blocks, num_stages=2, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform")
        config = {
            "train_micro_batch_size_per_gpu": oracle.BATCH,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "torch_adam": True}},
            "pipeline": {"use_reentrant": False},
            "smartfrz": {"total_steps": 9, **smartfrz},
        }
        try:
            smartfrz_ds.initialize(model=module, config=config, probe_batch=probe_batch())
        except ValueError as error:
            return str(error)
        return ""

    return {
        "groups": said(stage=2, smartfrz={"policy": "freezeout", "total_steps": 9}),
        "dry": said(stage=2, smartfrz={"policy": "freezeout", "total_steps": 9, "dry_run": True}),
        "length": said(stage=2, smartfrz={"policy": "freezeout"}, groups="none"),
        "probe": said(stage=2, smartfrz={"policy": "egeria"}),
        "short": said(stage=2, smartfrz={"policy": "late", "probe": 16, "total_steps": 9}),
        # last: a pipeline leaves its grid in DeepSpeed's global state
        "pipeline gradients": in_a_pipeline(policy="autofreeze"),
        "pipeline activations": in_a_pipeline(policy="egeria"),
        "pipeline probe": in_a_pipeline(policy="late", probe=4),
        "pipeline rates": in_a_pipeline(policy="freezeout"),
        "pipeline late": in_a_pipeline(policy="late"),
    }


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    cases = {f.__name__: f for f in (gradients, probe, freezeout, policy, resumed, thawed, refused)}
    warnings.simplefilter("ignore")
    with ranks.job() as (job, folder):
        for item in job:
            function = cases[item.pop("function")]
            with ranks.case(item["name"]):
                ranks.write(folder, item["name"], function(folder=folder, **item))


if __name__ == "__main__":
    main()
