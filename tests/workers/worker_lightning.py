"""Trains the net of the oracle with a real Lightning Trainer and a LightningFreezeCallback. Launched by test_lightning.py, and imported by
it for what runs in one process.

Lightning runs two strategies on GPUs only: DeepSpeedStrategy and FSDPStrategy. Here a subclass of each leaves out the checks for a GPU, and
names FSDP the CPU as its device.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from reference import oracle
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from workers import ranks

import smartfrz_ds

STEPS, EPOCHS = 12, 2
# Freezes at the steps 2 (the embeddings), 4 and 6, and no more than 60 % of the layers.
SETTINGS: dict[str, Any] = {
    "policy": "linear",
    "linear": {"start_step": 2, "end_step": 6},
    "max_frozen_fraction": 0.6,
    "snapshot_interval": 2,
    "freeze_interval": 2,
    "cooldown": 0,
    "warmup_steps": 0,
}
FRONT = ["embeddings", "net.blocks.0", "net.blocks.1"]
# By the user's own callback: freezes, thaws one layer again, and freezes once more.
PLAN = {"2": ["freeze", ["embeddings", "blocks.0"]], "5": ["thaw", ["blocks.0"]], "8": ["freeze", ["blocks.0", "blocks.1"]]}


class Module(pl.LightningModule):
    """Layers: embeddings, net.blocks.0 to net.blocks.4, head."""

    def __init__(self, accumulation: int = 1, *, by_forward: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.net = oracle.Net()
        self.accumulation, self.by_forward = accumulation, by_forward
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss_at(self, step: int, micro: int) -> Tensor:
        x, y = oracle.data(step, micro, self.global_rank)
        x = x.to(self.net.inp.weight.dtype)  # with DeepSpeed the weights themselves are bf16
        return nn.functional.cross_entropy((self(x) if self.by_forward else self.net(x)).float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # by number, since Lightning starts its loader anew where it resumes within an epoch
        number = self.trainer.fit_loop.total_batch_idx
        loss = self.loss_at(number // self.accumulation, number % self.accumulation)
        self.log("train_loss", loss)
        if self.automatic_optimization:
            return {"loss": loss}
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        scheduler.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss_at(99, 0), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
        return [optimizer], [{"scheduler": oracle.schedule(optimizer), "interval": "step"}]


class Sharded(Module):
    """For FSDP2: the user shards in configure_model."""

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class DeepSpeedOnCpu(DeepSpeedStrategy):
    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # it tells DeepSpeed the index

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class FsdpOnCpu(FSDPStrategy):
    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
            return super()._setup_model(model)
        return FullyShardedDataParallel(model, sharding_strategy=self.sharding_strategy, device_id=self.root_device, **self.kwargs)


def is_layer(module: nn.Module) -> bool:
    """Whether FSDP1 wraps it: each layer is a unit of its own."""
    ends = isinstance(module, nn.Linear) and (module.in_features == oracle.INPUTS or module.out_features == oracle.CLASSES)
    return ends or isinstance(module, oracle.Block)


class Acts(Callback):
    """What a user's own callback does with the controller: freeze and thaw after the steps of a plan."""

    def __init__(self, freezer: Any, plan: Mapping[str, Any]) -> None:
        self.freezer, self.plan = freezer, plan

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        controller = self.freezer.controller
        event = self.plan.get(str(trainer.global_step))
        if event and not any(e.step == controller.step for e in controller.report().events):
            names = [n if n in ("embeddings", "head") else f"net.{n}" for n in event[1]]
            (controller.freeze if event[0] == "freeze" else controller.thaw)(names)


class Sees(Callback):
    """What is frozen when a validation runs, and the values that were logged."""

    def __init__(self) -> None:
        self.frozen: list[int] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if "smartfrz/frozen_layers" in trainer.callback_metrics:
            self.logged.append(float(trainer.callback_metrics["smartfrz/frozen_layers"]))


def strategy_of(case: Mapping[str, Any]) -> Any:
    how, settings = case["how"], settings_of(case)
    if how == "ddp":
        return DDPStrategy()
    if how == "fsdp1":
        return FsdpOnCpu(auto_wrap_policy=CustomPolicy(is_layer), state_dict_type=case.get("format", "full"))
    if how == "fsdp2":
        return ModelParallelStrategy(world_of(case), 1, save_distributed_checkpoint=case.get("format", "sharded") == "sharded")
    if how == "alone":
        return "auto"
    return DeepSpeedOnCpu(
        config={
            "train_micro_batch_size_per_gpu": oracle.BATCH,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "smartfrz": settings,
        }
    )


def world_of(case: Mapping[str, Any]) -> int:
    return 1 if case["how"] == "alone" else case.get("devices") or dist.get_world_size()


def settings_of(case: Mapping[str, Any]) -> dict[str, Any]:
    own = {"policy": "manual", "total_steps": STEPS, "keep_state": case.get("keep_state", 0)} if case.get("plan") else SETTINGS
    return own | case.get("smartfrz", {})


def module_of(case: Mapping[str, Any]) -> Module:
    kind = Sharded if case["how"] == "fsdp2" else Module
    return kind(case.get("accumulation", 1), by_forward=case.get("by_forward", False), manual=case.get("manual", False))


def callback_of(case: Mapping[str, Any]) -> Any:
    return smartfrz_ds.LightningFreezeCallback(**({} if case["how"] == "deepspeed" else settings_of(case)))


def trainer_for(case: Mapping[str, Any], folder: Path, *, saves: bool = False, package: str = "lightning.pytorch", **more: Any) -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    freezer = more.pop("freezer", None) or callback_of(case)
    callbacks = [freezer, *more.pop("callbacks", ())]
    if case.get("plan"):
        callbacks.append(Acts(freezer, case["plan"]))
    if saves:
        saving = ModelCheckpoint(
            folder / case["name"], filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
        )
        callbacks.append(saving)
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world_of(case),
        "strategy": strategy_of(case),
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": case.get("accumulation", 1),
        "gradient_clip_val": case.get("clip"),
        "gradient_clip_algorithm": case.get("clip_algorithm"),
        "precision": case.get("precision", "32-true"),
        "callbacks": callbacks,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": saves,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    trainer = import_module(package).Trainer(**given | more)
    trainer.freezer = freezer
    return trainer


def loader(case: Mapping[str, Any], batches: int | None = None) -> Any:
    """As many batches as an epoch has; their content is not used."""
    count = batches if batches is not None else STEPS // EPOCHS * case.get("accumulation", 1)
    return torch.utils.data.DataLoader(torch.arange(count), batch_size=1)


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights by the oracle's names, gathered where they are cut."""
    import deepspeed

    def copied() -> dict[str, Tensor]:
        found = {}
        for name, p in module.named_parameters():
            full = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
            found[name.replace("_fsdp_wrapped_module.", "").removeprefix("module.").removeprefix("net.")] = full.clone()
        return found

    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        with FullyShardedDataParallel.summon_full_params(module):
            return copied()
    with deepspeed.zero.GatheredParameters([p for p in module.parameters() if hasattr(p, "ds_id")]):
        return copied()


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - value).abs().max()) for name, value in other.items())


def cell_of(case: Mapping[str, Any], plan: Mapping[str, Any]) -> oracle.Cell:
    """The oracle's own description of a case."""
    return oracle.Cell(
        case["name"],
        stage=case.get("stage", 0),
        dtype="bf16" if case["how"] == "deepspeed" and case.get("precision") == "bf16-mixed" else "fp32",
        clip=case.get("clip", 0.0),
        accumulation=case.get("accumulation", 1),
        keep_state=case.get("keep_state", 0),
        plan=dict(plan),
        steps=STEPS,
    )


def plan_of(events: list[list[Any]]) -> dict[str, Any]:
    return {str(step): [kind, [layer.removeprefix("net.") for layer in layers]] for kind, step, layers in events if kind != "load"}


def facts_of(trainer: Any) -> dict[str, Any]:
    controller = trainer.freezer.controller
    report = controller.report()
    return {
        "layers": report.layers,
        "frozen": report.frozen,
        "events": [[e.kind, e.step, e.layers] for e in report.events],
        "step": report.step,
        "total_steps": controller.total_steps,
        "saved_flops": report.saved_flops_fraction,
        "optimizer_bytes": report.optimizer_bytes,
        "trainable": all(p.requires_grad for p in trainer.lightning_module.parameters()),
        "global_step": trainer.global_step,
    }


class Final(Callback):
    """The weights at the end of training, while model and engine are still there."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = whole(trainer.strategy.model)


def fit(case: Mapping[str, Any], folder: Path, checkpoint: Path | None = None, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    final = Final()
    module, validation = more.pop("module", None), more.pop("validation", ())
    module = module_of(case) if module is None else module
    trainer = trainer_for(case, folder, callbacks=[final, *more.pop("callbacks", ())], **more)
    trainer.fit(module, loader(case), *validation, ckpt_path=checkpoint)
    return trainer, final.weights


def checkpoint(case: Mapping[str, Any], folder: Path, step: int) -> Path:
    return folder / case["name"] / f"step={step}.ckpt"


def run(case: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One training from start to end, one more from each of some of its checkpoints, and one from what is saved after a fit()."""
    trainer, weights = fit(case, folder, saves=True)
    facts = facts_of(trainer)
    found = oracle.reference(cell_of(case, plan_of(facts["events"])), world=world_of(case), noise=lambda step, g: g / divided(case))
    plain = oracle.reference(cell_of(case, {}), world=world_of(case))
    flat = torch.cat([w.float().reshape(-1) for w in weights.values()])
    facts["worst"], facts["unfrozen"] = (float((x.weights[-1] - flat).abs().max()) for x in (found, plain))
    facts["rms"] = oracle_distance(found.weights[-1], flat)
    facts["resumed"] = {}
    for step in case.get("resumes", ()):
        again, end = fit(case, folder, checkpoint(case, folder, step))
        facts["resumed"][step] = {"worst": apart(weights, end), **facts_of(again)}
    if "again" in case:  # the same Trainer and module, from a checkpoint with another freeze state than they have
        trainer.fit(trainer.lightning_module, loader(case), ckpt_path=checkpoint(case, folder, case["again"]))
        last = next(c for c in trainer.callbacks if isinstance(c, Final)).weights
        facts["again"] = {"worst": apart(weights, last), **facts_of(trainer)}
    if "ends" in case:  # saved by hand, when fit() has returned and every layer is trainable
        settings = {"smartfrz": {**case.get("smartfrz", {}), "total_steps": STEPS}}
        early, _ = fit({**case, **settings}, folder, max_epochs=case["ends"])
        path = folder / case["name"] / "by-hand.ckpt"
        early.save_checkpoint(path)
        later, end = fit(case, folder, path)
        facts["ended"] = {"worst": apart(weights, end), "early": facts_of(early), **facts_of(later)}
    if case.get("tests"):
        module = module_of(case)
        tester = trainer_for(case, folder)
        before = tester.validate(module, loader(case, 2), verbose=False)[0]["val_loss"]
        after = tester.validate(module, loader(case, 2), verbose=False, ckpt_path=checkpoint(case, folder, STEPS))[0]["val_loss"]
        facts["tested"] = [before, after]
    return facts


def divided(case: Mapping[str, Any]) -> int:
    """Lightning divides the loss by the number of micro-batches, and DeepSpeed does so again."""
    return case.get("accumulation", 1) if case["how"] == "deepspeed" else 1


def oracle_distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().mean().sqrt())


def main() -> None:
    with ranks.job() as (cases, folder):
        for case in cases:
            with ranks.case(case["name"]):
                torch.set_num_threads(oracle.THREADS)
                ranks.write(folder, case["name"], run(case, folder))
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(folder / case["name"], ignore_errors=True)
                dist.barrier()


if __name__ == "__main__":
    main()
