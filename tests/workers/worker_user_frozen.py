"""Gradual unfreezing: everything but the head is frozen by the user before the start, and thawed layer by layer, on real engines.

Launched by test_user_frozen.py on two ranks. `reference` is the single process with plain torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from reference import oracle, torch_models
from reference.oracle import Cell, Net
from safetensors.torch import save_file
from torch import Tensor, nn
from workers import ranks
from workers.worker_exact import full

import smartfrz_ds

STEPS, FIRST_SAVE, SECOND_SAVE = 13, 6, 10
# before which step what is thawed or frozen; at the first save a layer that was thawed is frozen again
PLAN: dict[int, tuple[str, list[str]]] = {
    1: ("thaw", ["blocks.4"]),
    3: ("thaw", ["blocks.3"]),
    5: ("freeze", ["blocks.3"]),
    7: ("thaw", ["blocks.3"]),
    9: ("thaw", ["blocks.1", "blocks.2"]),
    11: ("thaw", ["blocks.0"]),
    12: ("thaw", ["embeddings"]),
}
# name -> checkpoint, its step, whether the resuming script freezes what the original did; else it freezes nothing
RESUMES = {
    "first": ("one", FIRST_SAVE, True),
    "second": ("two", SECOND_SAVE, True),
    "first, thawed": ("one", FIRST_SAVE, False),
    "second, thawed": ("two", SECOND_SAVE, False),
}
LEFT_AT_FIRST = ["embeddings", "blocks.0", "blocks.1", "blocks.2"]


def begin(net: nn.Module) -> nn.Module:
    for name, p in net.named_parameters():
        p.requires_grad_(oracle.layer_of(name) == "head")
    return net


def optimizer_for(model: nn.Module, groups: int, *, given: bool) -> tuple[Any, Any]:
    """given: the optimizer holds what the user froze, too."""
    shapes = dict(Net().named_parameters())
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters() if given or p.requires_grad]
    params = oracle.groups_of([p for _, p in named], [shapes[n] for n, _ in named], groups)
    optimizer = torch.optim.AdamW(params, lr=oracle.LR, weight_decay=oracle.DECAY)
    return optimizer, oracle.schedule(optimizer)


def reference(stage: int, groups: int, dtype: str = "fp32") -> list[Tensor]:
    """All weights after each step of one process."""
    torch.set_num_threads(oracle.THREADS)
    cell = Cell("reference", stage=stage, groups=groups, dtype=dtype)
    net = begin(Net().bfloat16() if dtype == "bf16" else Net())
    named = dict(net.named_parameters())
    master = {p: p.detach().float().clone().requires_grad_() for p in named.values()}
    params = oracle.groups_of([master[p] for p in named.values()], list(named.values()), groups)
    optimizer = torch.optim.AdamW(params, lr=oracle.LR, weight_decay=oracle.DECAY)
    scheduler, weights = oracle.schedule(optimizer), []
    if stage == 0 and dtype == "bf16":
        oracle._construction_step(optimizer, {p: m for p, m in master.items() if p.requires_grad})
    for step in range(STEPS):
        action, layers = PLAN.get(step, ("", []))
        for name, p in named.items():
            if oracle.layer_of(name) in layers:
                p.requires_grad_(action == "thaw")
                optimizer.state.pop(master[p], None)
                master[p].data.copy_(p.data)  # it was released: it comes back rounded
        live = [p for p in named.values() if p.requires_grad]
        optimizer.zero_grad()
        for p, gradient in oracle._gradients(net, live, cell, step, range(2)).items():
            master[p].grad = gradient.float()
        optimizer.step()
        scheduler.step()
        for p in live:
            p.data.copy_(master[p].data)
        weights.append(torch.cat([p.detach().float().view(-1) for p in named.values()]))
    return weights


class Run:
    """One engine. kind: "z0" to "z3", "ddp" or "fsdp2". how: groups, given, dtype, zero (settings of ZeRO), resumes (which), by_position (a
    resume of a script that freezes nothing is refused)."""

    def __init__(self, kind: str, how: dict[str, Any], *, freezes: bool = True, start: float = 0.0) -> None:
        """freezes: as the original script, else everything trains at the start and is in the optimizer. start: added to all weights."""
        self.kind, self.dtype = kind, how.get("dtype", "fp32")
        self.net = begin(Net()) if freezes else Net()
        with torch.no_grad():
            for p in self.net.parameters():
                p.add_(start)
        given, groups = how["given"] or not freezes, how["groups"]
        if kind[0] == "z":
            optimizer, scheduler = optimizer_for(self.net, groups, given=given)
            config: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": oracle.BATCH,
                "gradient_clipping": 0.0,
                "steps_per_print": 10**9,
                "zero_optimization": {"stage": int(kind[1]), "reduce_bucket_size": 3000, "allgather_bucket_size": 2000}
                | how.get("zero", {}),
                "zero_force_ds_cpu_optimizer": False,
                "smartfrz": {"policy": "manual"},
            }
            if self.dtype == "bf16":
                config |= {"bf16": {"enabled": True}, **how.get("config", {})}
            self.model = smartfrz_ds.initialize(model=self.net, optimizer=optimizer, lr_scheduler=scheduler, config=config)[0]
            self.controller, self.optimizer, self.scheduler = self.model.smartfrz, self.model.basic_optimizer, scheduler
        else:
            self.model = torch_models.wrap(kind, self.net)
            self.optimizer, self.scheduler = optimizer_for(self.model, groups, given=given)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.controller = smartfrz_ds.attach_torch(self.model, self.optimizer, {"policy": "manual"}, scheduler=self.scheduler)
            self.params = dict(self.model.named_parameters())

    def steps(self, numbers: range) -> list[Tensor]:
        weights = []
        for step in numbers:
            if step in PLAN:
                action, layers = PLAN[step]
                getattr(self.controller, action)(layers)
            loss = oracle.loss_of(self.model, *oracle.data(step, 0, dist.get_rank()), self.dtype)
            if self.kind[0] == "z":
                self.model.backward(loss)
                self.model.step()
                now = full(self.net)
            else:
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                now = torch_models.full(self.kind, self.model, self.params)
            weights.append(torch.cat([now[n].float().view(-1) for n, _ in Net().named_parameters()]))
        return weights

    def save(self, folder: Path) -> None:
        if self.kind[0] == "z":
            self.model.save_checkpoint(str(folder))
            return
        torch_models.save(folder, self.model, self.optimizer, self.controller)
        torch.save(self.scheduler.state_dict(), folder / f"scheduler.{dist.get_rank()}.pt")

    def load(self, folder: Path) -> None:
        if self.kind[0] == "z":
            self.model.load_checkpoint(str(folder))
            return
        torch_models.load(folder, self.model, self.optimizer, self.controller)
        self.scheduler.load_state_dict(torch.load(folder / f"scheduler.{dist.get_rank()}.pt"))

    def facts(self) -> dict[str, Any]:
        report = self.controller.report()
        return {
            "frozen": list(report.frozen),
            "user_frozen": list(report.user_frozen),
            "groups": [[self._name(p) for p in group] for group in self.controller.backend.groups],
            "bytes": report.optimizer_bytes,
        }

    def _name(self, wanted: Any) -> str:
        return next(n for n, p in self.net.named_parameters() if p is wanted)

    def end(self) -> None:
        if self.kind[0] == "z":
            self.model.destroy()


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return (torch.stack(a) - torch.stack(b)).abs().max().item()


def run(kind: str, how: dict[str, Any], folder: Path) -> tuple[list[Tensor], dict[str, Any]]:
    original = Run(kind, how)
    facts: dict[str, Any] = {"start": original.facts()}
    weights = original.steps(range(FIRST_SAVE))
    original.save(folder / "one")
    facts["first"] = original.facts()
    weights += original.steps(range(FIRST_SAVE, SECOND_SAVE))
    original.save(folder / "two")
    facts["second"] = original.facts()
    weights += original.steps(range(SECOND_SAVE, STEPS))
    facts["end"] = original.facts()
    for name in how["resumes"]:
        place, at, freezes = RESUMES[name]
        resumed = Run(kind, how, freezes=freezes, start=1.0)
        if not freezes and how.get("by_position"):
            facts[name] = torch_models.refusal(lambda: resumed.load(folder / place))  # noqa: B023
            resumed.end()
            continue
        resumed.load(folder / place)
        facts[name] = resumed.facts() | {"difference": difference(resumed.steps(range(at, STEPS)), weights[at:])}
        resumed.end()
    if "rollback" in how:
        original.load(folder / "one")
        facts["rolled back"] = original.facts()
        facts["rolled back"]["difference"] = difference(original.steps(range(FIRST_SAVE, STEPS)), weights[FIRST_SAVE:])
    original.end()
    return weights, facts


def refusals() -> dict[str, str]:
    """FSDP1 and pipelines: what is said, and that nothing has changed."""
    said = {}
    model = torch_models.wrap("fsdp1", begin(Net()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=oracle.LR)
    controller = smartfrz_ds.attach_torch(model, optimizer, torch_models.settings())
    said["fsdp1"] = torch_models.refusal(lambda: controller.thaw(["blocks.4"]))
    assert controller.report().user_frozen == (*LEFT_AT_FIRST, "blocks.3", "blocks.4") and not controller.frozen
    entries = [nn.Linear(oracle.INPUTS, oracle.WIDTH), *(oracle.Block(oracle.WIDTH) for _ in range(4)), nn.Linear(oracle.WIDTH, 3)]
    for block in entries[1:3]:
        block.requires_grad_(False)
    module = PipelineModule(entries, num_stages=2, loss_fn=nn.functional.cross_entropy, partition_method="uniform")
    config = {"train_micro_batch_size_per_gpu": oracle.BATCH, "gradient_accumulation_steps": 2, "smartfrz": {"policy": "manual"}}
    trained = [p for p in module.parameters() if p.requires_grad]
    engine = smartfrz_ds.initialize(model=module, optimizer=torch.optim.AdamW(trained), config=config)[0]
    said["pipeline"] = torch_models.refusal(lambda: engine.smartfrz.thaw(["layers.2"]))
    engine.smartfrz.freeze(["layers.2"])
    assert not engine.smartfrz.frozen and engine.smartfrz.report().user_frozen == ("layers.1", "layers.2")
    engine.destroy()
    return said


def main() -> None:
    with ranks.job() as (work, folder):
        for name, (kind, how) in work["cells"].items():
            with ranks.case(name):
                weights, facts = run(kind, how, folder / name)
                save_file({"weights": torch.stack(weights)}, folder / f"{name}.{dist.get_rank()}.safetensors")
                ranks.write(folder, name, facts)
        if work["refusals"]:
            ranks.write(folder, "refusals", refusals())


if __name__ == "__main__":
    main()
