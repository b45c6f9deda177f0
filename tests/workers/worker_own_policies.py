"""Runs policies of users and schedules on real engines, straight and resumed (test_own_policies.py, test_schedules_run.py)."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle, own_policies
from reference.torch_models import full as full_torch
from reference.torch_models import load, save, wrap
from safetensors.torch import save_file
from workers import ranks, worker_hf
from workers.worker_exact import full

import smartfrz_ds

QUICK = {"warmup_steps": 0, "freeze_interval": 1, "snapshot_interval": 1, "cooldown": 0, "sample_size": 16, "max_frozen_fraction": 1.0}


class Run:
    """One training of the oracle's net. how: z0 to z3, ddp, fsdp2 or one."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.how: str = case["how"]
        self.net = oracle.Net()
        for name, p in self.net.named_parameters():
            p.requires_grad_(oracle.layer_of(name) not in case.get("user_frozen", ()))
        given = {} if "object" not in case else {"policy": getattr(own_policies, case["object"])(**case.get("arguments", {}))}
        section = QUICK | case["smartfrz"]
        self.micros = case.get("accumulation", 1)
        if self.how.startswith("z"):
            config = {
                "train_micro_batch_size_per_gpu": oracle.BATCH,
                "gradient_accumulation_steps": self.micros,
                "gradient_clipping": 0.0,
                "steps_per_print": 10**9,
                "zero_optimization": {"stage": int(self.how[1:]), "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
                "smartfrz": section,
            }
            optimizer = self._adam(self.net)
            self.engine: Any = smartfrz_ds.initialize(
                model=self.net, optimizer=optimizer, lr_scheduler=oracle.schedule(optimizer), config=config, **given
            )[0]
            self.controller = self.engine.smartfrz
            return
        self.model: Any = wrap(self.how, self.net)
        self.params = dict(self.model.named_parameters())
        self.optimizer = self._adam(self.model)
        self.scheduler = oracle.schedule(self.optimizer)
        self.controller = smartfrz_ds.attach_torch(self.model, self.optimizer, section, scheduler=self.scheduler, **given)

    @staticmethod
    def _adam(model: Any) -> torch.optim.AdamW:
        params = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(params, lr=oracle.LR, weight_decay=oracle.DECAY)

    def step(self, number: int) -> None:
        rank = dist.get_rank()
        if self.how.startswith("z"):
            for micro in range(self.micros):
                loss = oracle.loss_of(self.engine, *oracle.data(number, micro, rank), "fp32")
                self.engine.backward(loss)
                self.engine.step()
            return
        self.optimizer.zero_grad()
        loss = oracle.loss_of(self.model, *oracle.data(number, 0, rank), "fp32")
        self.controller.record_loss(loss)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()

    def weights(self) -> torch.Tensor:
        now = full(self.net) if self.how.startswith("z") else full_torch(self.how, self.model, self.params)
        return torch.cat([p.float().view(-1) for p in now.values()])

    def save(self, folder: Path) -> None:
        if self.how.startswith("z"):
            self.engine.save_checkpoint(str(folder), tag="saved")
        else:
            save(folder, self.model, self.optimizer, self.controller)

    def load(self, folder: Path, step: int) -> None:
        if self.how.startswith("z"):
            self.engine.load_checkpoint(str(folder), tag="saved")
        else:
            load(folder, self.model, self.optimizer, self.controller)
            self.scheduler.load_state_dict(self.scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1})

    def end(self) -> None:
        if self.how.startswith("z"):
            self.engine.destroy()
        else:
            self.controller.detach()


def metrics_at(case: dict[str, Any], run: Run, step: int) -> None:
    """Report the case's metric after a step: each rank another value, whose mean is the one in the case."""
    for name, values in case.get("metrics", {}).items():
        value = values[min(step, len(values) - 1)]
        if value is not None:
            run.controller.observe(**{name: value + (0.25 if dist.get_rank() else -0.25)})


def straight(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run, and its resumes from the steps in `resumes`: how far each step's weights are from those of the straight run."""
    run, weights, steps = Run(case), [], case.get("steps", 11)
    at_start = list(run.controller.frozen)
    for step in range(steps):
        if step in case.get("resumes", ()):
            run.save(folder / f"{case['name']}-{step}")
        metrics_at(case, run, step)
        run.step(step)
        weights.append(run.weights())
    report = run.controller.report()
    facts: dict[str, Any] = {
        "at_start": at_start,
        "frozen": list(run.controller.frozen),
        "events": [[e.kind, e.step, list(e.layers)] for e in report.events],
        "reasons": [dict(e.reasons) for e in report.events],
        "messages": [e.message for e in report.events],
        "resumed": {},
    }
    run.end()
    for begin in case.get("resumes", ()):
        again = Run(case)
        again.load(folder / f"{case['name']}-{begin}", begin)
        worst = 0.0
        for step in range(begin, steps):
            metrics_at(case, again, step)
            again.step(step)
            worst = max(worst, float((again.weights() - weights[step]).abs().max()))
        facts["resumed"][str(begin)] = {"worst": worst, "frozen": list(again.controller.frozen)}
        again.end()
    if dist.get_rank() == 0:
        save_file({"weights": torch.stack(weights)}, folder / f"{case['name']}.safetensors")
    return facts


def refused(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a start says, by case: on every rank the same fault or, for 'only rank 0', on rank 1 alone."""
    said = {}
    for name, settings in case["starts"].items():
        if name == "only rank 0" and dist.get_rank() == 0:
            module = types.ModuleType("only_on_rank_0")
            module.Good = own_policies.Good  # type: ignore[attr-defined]
            sys.modules["only_on_rank_0"] = module
        try:
            run = Run({"how": case["how"], "smartfrz": settings})
            run.step(0)
            run.end()
            said[name] = ["", ""]
        except Exception as error:
            said[name] = [type(error).__name__, str(error)]
    return said


def answers(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a run does whose policy answers nonsense at its second stage."""
    found = {}
    for how in case["answers"]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = Run({"how": case["how"], "smartfrz": {"policy": "reference.own_policies:Answers", "policy_settings": {"how": how}}})
            for step in range(4):
                run.step(step)
        mine = [str(w.message) for w in caught if str(w.message).startswith("smartfrz:")]
        found[how] = {"warnings": mine, "frozen": list(run.controller.frozen), "step": run.controller.step}
        run.end()
    return found


def unsaved(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A policy whose state cannot be saved after step 2: the save raises on every rank, training goes on, and the next save works."""
    run, said = Run({"how": case["how"], "smartfrz": {"policy": "reference.own_policies:FailsToSave"}}), []
    for step in range(4):
        run.step(step)
        try:
            run.save(folder / f"unsaved-{step}")
            said.append("")
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    run.end()
    return {"said": said}


def doors(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same policy as an object in the callback of a Trainer (DeepSpeed and DDP), trained twice, and in prepare."""
    events = {}
    for name, how in {"trainer-z2": {"how": "deepspeed", "stage": 2, "arguments": True}, "trainer-ddp": {"how": "ddp"}}.items():
        callback = smartfrz_ds.FreezeCallback(policy=own_policies.EveryThird(every=4), **QUICK)
        for again in ("", "-again"):
            trainer = worker_hf.trainer_for({"name": name + again, "model": "llama", **how}, folder, callback=callback, save_strategy="no")
            trainer.train()
            events[name + again] = worker_hf.facts_of(trainer)["events"]
            worker_hf.finish(trainer)
    own = QUICK | {"policy": own_policies.EveryThird(every=4)}
    hf: dict[str, Any] = {"name": "accelerate", "how": "ddp", "model": "llama", "smartfrz": own}
    parts = worker_hf.prepared(hf)
    events["accelerate"] = worker_hf.train_on(hf, parts, 0, None)["events"]
    parts[0].free_memory()
    return events


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    functions = {f.__name__: f for f in (straight, refused, answers, unsaved, doors)}
    with ranks.job() as (cases, folder):
        for case in cases:
            with ranks.case(case["name"]):
                ranks.write(folder, case["name"], functions[case.get("function", "straight")](case, folder))


if __name__ == "__main__":
    main()
