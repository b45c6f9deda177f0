"""Trains tiny Hugging Face models with a real Trainer and a FreezeCallback, and, for comparison, in one process with plain torch.

Launched by test_hf.py. The oracle takes both ranks' batches, torch's AdamW in the Trainer's groups and the
same freezes; it shares with the package only what the layers are.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from reference.bounds import Noisy, distance, no_noise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from workers import ranks

import smartfrz_ds
from smartfrz_ds.model.layers import find_layers

VOCABULARY, TOKENS, BATCH, STEPS, LR, DECAY = 40, 8, 2, 12, 1e-2, 0.1
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


class InOrder(Trainer):
    """Takes the data in order; transformers 4.57 has no argument for it."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def model_of(kind: str) -> Any:
    """A tiny model, always the same weights."""
    torch.manual_seed(0)
    if kind == "gpt2":  # with its input embedding and head tied, as it is
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        )
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                max_position_embeddings=16,
                tie_word_embeddings=False,
            )
        )
    if kind == "bert":
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
                hidden_dropout_prob=0,
                attention_probs_dropout_prob=0,
                num_labels=3,
            )
        )
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                dropout_rate=0,
                decoder_start_token_id=0,
                tie_word_embeddings=False,
            )
        )
    assert kind == "lora", kind
    from peft import LoraConfig, get_peft_model

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks transformers 5.23 for it
    return get_peft_model(model_of("llama"), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))


class Texts(torch.utils.data.Dataset):
    """Random tokens; (TOKENS,) int64."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + index)
        ids = torch.randint(1, VOCABULARY, (TOKENS,), generator=generator)
        if self.kind == "bert":
            return {"input_ids": ids, "labels": int(ids[0]) % 3}
        more = {"decoder_input_ids": ids.roll(1)} if self.kind == "t5" else {}
        return {"input_ids": ids, **more, "labels": ids.clone()}


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss of a micro-batch, the mean; the Trainer adds up what it gives, whatever the accumulation."""
    logits = outputs["logits"]
    if logits.ndim == 3:
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return nn.functional.cross_entropy(logits, labels)


# --- the Trainer ------------------------------------------------------------------------------------------------------------------


class Seen(TrainerCallback):
    """What another callback is shown: the logs, as TensorBoard would get them, and what is frozen when a checkpoint is written."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Mapping[str, Any], **_: Any) -> None:
        self.logs.append(dict(logs))


def ds_config(case: Mapping[str, Any]) -> dict[str, Any] | None:
    if case["how"] != "deepspeed":
        return None
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": case.get("clip", 0.0),
        "bf16": {"enabled": case.get("bf16", False)},
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
        "zero_force_ds_cpu_optimizer": False,
    }
    if case.get("json_optimizer"):
        config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": True}}
    if not case.get("arguments"):
        config["smartfrz"] = settings_of(case)
    return config


def settings_of(case: Mapping[str, Any]) -> dict[str, Any]:
    return SETTINGS | case.get("smartfrz", {})


def trainer_for(case: Mapping[str, Any], folder: Path, *, model: Any = None, callback: Any = None, **more: Any) -> Any:
    reset()
    if callback is None:
        own = case["how"] != "deepspeed" or case.get("arguments")
        callback = smartfrz_ds.FreezeCallback(**settings_of(case)) if own else smartfrz_ds.FreezeCallback()
    accumulation = case.get("accumulation", 1)
    arguments: dict[str, Any] = {
        "output_dir": str(folder / case["name"]),
        "use_cpu": True,
        "deepspeed": ds_config(case),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,  # the length of the run follows from the data
        "learning_rate": LR,
        "weight_decay": DECAY,
        "optim": "adamw_torch",
        "max_grad_norm": case.get("clip", 0.0),
        "bf16": case.get("bf16", False),
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "average_tokens_across_devices": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    if case["how"] == "fsdp2":
        units = {"transformer_layer_cls_to_wrap": case["units"]} if "units" in case else {}
        arguments |= {"fsdp": True, "fsdp_config": {"state_dict_type": case["format"]} | units} | accelerated()
        if not hasattr(TrainingArguments, "_process_fsdp_args"):
            # transformers 4 leaves these to `accelerate launch`, which sets them; without, it is FSDP1, which Accelerate refuses on a CPU
            policy = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": case["format"]}
            os.environ.update({"FSDP_VERSION": "2", **policy})
    trainer = InOrder(
        model=model if model is not None else model_of(case["model"]),
        args=TrainingArguments(**named(arguments | case.get("trainer", {}) | more)),
        train_dataset=Texts(case["model"], BATCH * accumulation * world_size() * STEPS // 2),
        eval_dataset=Texts(case["model"], 8),
        compute_loss_func=loss_of,
        callbacks=[Seen()],
    )
    trainer.add_callback(callback)
    trainer.freezer, trainer.seen = callback, next(c for c in trainer.callback_handler.callbacks if isinstance(c, Seen))
    return trainer


def named(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments under the names of this version: transformers 4 calls activation checkpointing after gradients."""
    known = inspect.signature(TrainingArguments.__init__).parameters
    return {k if k in known else k.replace("activation_", "gradient_"): v for k, v in arguments.items()}


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reset() -> None:
    """Accelerate keeps one state a process, in the environment too: the next training begins with none."""
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def accelerated() -> dict[str, Any]:
    """Accelerate shards on accelerators only. It is told that this CPU is one; all that follows is what it does there."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return {"accelerator_config": {"use_configured_state": True}}


def full(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights, gathered where they are cut."""
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return {n.removeprefix("module."): whole(p.detach()).clone() for n, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def facts_of(trainer: Any) -> dict[str, Any]:
    # the one that trained: the Trainer may have made it anew
    controller = next(c for c in trainer.callback_handler.callbacks if isinstance(c, smartfrz_ds.FreezeCallback)).controller
    report = controller.report()
    return {
        "layers": report.layers,
        "frozen": report.frozen,
        "events": [[e.kind, e.step, e.layers] for e in report.events],
        "step": report.step,
        "global_step": trainer.state.global_step,
        "total_steps": controller.total_steps,
        "saved_flops": report.saved_flops_fraction,
        "log_history": trainer.state.log_history,
        "seen_logs": trainer.seen.logs,
        "hooked": deepspeed.initialize is not PLAIN,
        "log_path": report.log_path,
    }


PLAIN = deepspeed.initialize


def run_straight(case: Mapping[str, Any], folder: Path) -> None:
    """One training from start to end, and (if the case says so) one that resumes from its checkpoints."""
    trainer = trainer_for(case, folder)
    trainer.train()
    facts, weights = facts_of(trainer), full(trainer.model)
    facts["evaluated"] = trainer.evaluate()["eval_loss"]
    if case.get("save_model"):
        trainer.save_model(str(folder / case["name"] / "last"))
        dist.barrier()
        saved = load_file(str(folder / case["name"] / "last" / "model.safetensors"))
        names = {"lm_head.weight": "transformer.wte.weight"}  # tied: one of the two is in the file
        facts["saved_apart"] = apart({names.get(n, n): w for n, w in saved.items()}, weights)
    if dist.get_rank() == 0:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{case['name']}.safetensors")
    if dist.get_rank() == 0 and case["model"] == "lora" and case.get("stage") == 2:
        states = folder / case["name"] / "checkpoint-4" / "global_step4" / "mp_rank_00_model_states.pt"
        facts["saved_names"] = sorted(torch.load(states, weights_only=False)["module"])
    facts["resumed"] = {}
    for step in case.get("resumes", []):
        again = trainer_for(case, folder, save_strategy="no")
        again.train(resume_from_checkpoint=str(folder / case["name"] / f"checkpoint-{step}"))
        end = full(again.model)
        facts["resumed"][step] = {"worst": apart(end, weights)} | facts_of(again)
        finish(again)
    finish(trainer)
    ranks.write(folder, case["name"], facts)


def run_best(case: Mapping[str, Any], folder: Path) -> None:
    """The best checkpoint is an early one, with fewer layers frozen: the Trainer loads it when training ends."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    case = {**case, "smartfrz": {"log_path": str(folder / f"{case['name']}.jsonl")}}
    trainer = trainer_for(case, folder, eval_strategy="steps", eval_steps=4, **best)
    trainer.train()
    saved = load_file(str(folder / case["name"] / "checkpoint-4" / "model.safetensors"))
    facts, weights = facts_of(trainer), full(trainer.model)
    facts["best"] = trainer.state.best_global_step
    facts["worst"] = max((weights[n] - w).abs().max().item() for n, w in saved.items())
    facts["trainable"] = all(p.requires_grad for p in trainer.model.parameters())
    finish(trainer)
    ranks.write(folder, case["name"], facts)


def run_again(case: Mapping[str, Any], folder: Path) -> None:
    """One model is trained, resumed, broken off in the middle, and resumed again: by one Trainer, or with DeepSpeed (where no Trainer can
    train a second time, and an engine must be destroyed before the next) by one Trainer each."""
    trainer = trainer_for(case, folder)

    def train(**more: Any) -> dict[str, Any]:
        nonlocal trainer
        if case["how"] == "deepspeed" and trainer.state.global_step:
            trainer.accelerator.free_memory()
            trainer = trainer_for(case, folder, model=trainer.model, callback=trainer.freezer)
        before = [n for n, p in trainer.model.named_parameters() if not p.requires_grad]
        if case.get("break"):
            trainer.add_callback(BreaksOff)
        with contextlib.suppress(InterruptedError):
            trainer.train(**more)
        trainer.remove_callback(BreaksOff) if case.get("break") else None
        return facts_of(trainer) | {"before": before}

    facts: dict[str, Any] = {"first": train()}
    weights, checkpoints = full(trainer.model), folder / case["name"]
    facts["second"] = train(resume_from_checkpoint=str(checkpoints / "checkpoint-4")) | {"worst": apart(full(trainer.model), weights)}
    case = {**case, "break": True, "name": "broken"}
    facts["broken"] = train()
    case = {**case, "break": False}
    facts["third"] = train(resume_from_checkpoint=str(checkpoints / "checkpoint-8")) | {"worst": apart(full(trainer.model), weights)}
    if case["how"] == "deepspeed":  # after training, as save_model does under ZeRO-3
        trainer.model_wrapped.save_checkpoint(str(checkpoints / "after"), tag="last")
        again = trainer_for(case, folder)
        again.train(resume_from_checkpoint=str(checkpoints / "checkpoint-12"))
        _, _ = again.model_wrapped.load_checkpoint(str(checkpoints / "after"))
        facts["after"] = {"worst": apart(full(again.model), weights), "frozen": again.freezer.controller.frozen}
        finish(again)
    finish(trainer)
    facts["trainable"] = all(p.requires_grad for p in trainer.model.parameters())
    ranks.write(folder, checkpoints.name, facts)


class BreaksOff(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            raise InterruptedError


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return distance(b, a)


# --- Accelerate -------------------------------------------------------------------------------------------------------------------


def prepared(case: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """accelerator, model, optimizer, scheduler: as a script of one's own would have them, but for `smartfrz_ds.prepare`."""
    reset()
    more: dict[str, Any] = {}
    if case["how"] == "deepspeed":
        config = ds_config(case) | {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1}
        more["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
        more["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]  # else it takes them for one process, on CPUs
    if case["how"] == "fsdp2":
        accelerated()
        more["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=case["format"])
    accelerator = Accelerator(cpu=case["how"] != "deepspeed", **more)
    model = model_of(case["model"])
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == decays], "weight_decay": DECAY if decays else 0.0}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    # Accelerate steps it once for each process.
    scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS * accelerator.num_processes)
    own = {} if case["how"] == "deepspeed" else settings_of(case)
    model, optimizer, scheduler = smartfrz_ds.prepare(accelerator, model, optimizer, scheduler, **own)
    return accelerator, model, optimizer, scheduler


def train_on(case: Mapping[str, Any], parts: tuple[Any, Any, Any, Any], begin: int, folder: Path | None) -> dict[str, Any]:
    accelerator, model, optimizer, scheduler = parts
    texts, world = Texts(case["model"], 10**6), dist.get_world_size()
    for step in range(begin, STEPS):
        model.train()
        batch = (step % (STEPS // 2)) * world + dist.get_rank()
        inputs = transformers.default_data_collator([texts[batch * BATCH + i] for i in range(BATCH)])
        labels = inputs.pop("labels")
        accelerator.backward(loss_of(model(**inputs), labels))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if folder is not None and (step + 1) % 4 == 0:
            accelerator.save_state(str(folder / case["name"] / str(step + 1)))
    report = accelerator.smartfrz.report()
    return {
        "layers": report.layers,
        "frozen": report.frozen,
        "events": [[e.kind, e.step, e.layers] for e in report.events],
        "step": report.step,
        "total_steps": accelerator.smartfrz.total_steps,
        "saved_flops": report.saved_flops_fraction,
        "hooked": deepspeed.initialize is not PLAIN,
    }


def run_accelerate(case: Mapping[str, Any], folder: Path) -> None:
    """A training loop of one's own, resumed with load_state."""
    parts = prepared(case)
    facts, weights = train_on(case, parts, 0, folder), full(parts[0].unwrap_model(parts[1]))
    if dist.get_rank() == 0:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{case['name']}.safetensors")
    parts[0].free_memory()
    facts["resumed"] = {}
    for step in case.get("resumes", []):
        again = prepared(case)
        again[0].load_state(str(folder / case["name"] / str(step)))
        seen = train_on(case, again, step, None)
        end = full(again[0].unwrap_model(again[1]))
        facts["resumed"][step] = seen | {"worst": apart(end, weights)}
        again[0].free_memory()
    ranks.write(folder, case["name"], facts)


def finish(trainer: Any) -> None:
    trainer.accelerator.free_memory()
    assert all(not hook.__class__.__module__.startswith("smartfrz") for m in trainer.model.modules() for hook in m._forward_hooks.values())


# --- the oracle -------------------------------------------------------------------------------------------------------------------


def layer_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> layer name."""
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: layer.name for layer in find_layers(model) for p in layer.params}


def reference(case: Mapping[str, Any], events: list[Any], *, world: int = 2, noise: Noisy = no_noise) -> dict[str, Tensor]:
    """All weights at the end of the same training in one process, both ranks' batches, freezing `events` [kind, step, layers]."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as the ranks
    model = model_of(case["model"])
    model.train()
    layer_of, names = layer_names(model), dict(model.named_parameters())
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [n for n, p in names.items() if p.requires_grad]
    one = case.get("json_optimizer")
    groups = [{"params": [names[n] for n in trained if one or n in decayed], "weight_decay": DECAY}]
    groups += [] if one else [{"params": [names[n] for n in trained if n not in decayed], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    texts, accumulation = Texts(case["model"], 10**6), case.get("accumulation", 1)
    at = {step: layers for kind, step, layers in events if kind == "freeze"}
    cut = False
    for step in range(STEPS):
        for name in at.get(step, ()):
            for n in trained:
                if layer_of[n] == name and not is_tied(model, names[n]):
                    names[n].requires_grad_(False)
                    names[n].grad = None
            if name == "embeddings" and any(is_tied(model, p) for p in names.values()) and not cut:
                cut = True  # the shared weight goes on training, through the head
                for module in model.modules():
                    if isinstance(module, nn.Embedding) and is_tied(model, module.weight):
                        module.register_forward_hook(lambda module, args, output: output.detach())
        live = [names[n] for n in trained if names[n].requires_grad]
        totals = {p: torch.zeros_like(p) for p in live}
        local = [{p: torch.zeros_like(p) for p in live} for _ in range(world)]
        for micro in range(accumulation):
            for rank in range(world):
                # the sequential sampler deals batches to ranks in turn; an epoch is half of the run
                batch = ((step % (STEPS // 2)) * accumulation + micro) * world + rank
                inputs = transformers.default_data_collator([texts[batch * BATCH + i] for i in range(BATCH)])
                labels = inputs.pop("labels")
                with torch.autocast("cpu", torch.bfloat16, enabled=case.get("bf16", False)):
                    loss = loss_of(model(**inputs), labels)
                for p, g in zip(live, torch.autograd.grad(loss, live), strict=True):
                    local[rank][p] += g
            if micro == accumulation - 1 or (case["how"] == "deepspeed" and case["stage"] >= 2):
                for p in live:
                    totals[p] += sum((local[r][p] / world for r in range(1, world)), start=local[0][p] / world)
                    for r in range(world):
                        local[r][p].zero_()
        for p in live:
            p.grad = noise(step, totals[p])
        if case.get("clip"):
            torch.nn.utils.clip_grad_norm_(live, case["clip"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {n: p.detach() for n, p in names.items()}


def is_tied(model: Any, param: Tensor) -> bool:
    head = model.get_output_embeddings()
    return head is not None and param is head.weight and head.weight is model.get_input_embeddings().weight


RUNS = {"straight": run_straight, "accelerate": run_accelerate, "best": run_best, "again": run_again}


def main() -> None:
    with ranks.job() as (cases, folder):
        for item in cases:
            with ranks.case(item["name"]), contextlib.ExitStack() as stack:
                stack.callback(shutil.rmtree, folder / item["name"], ignore_errors=True)
                RUNS[item.get("run", "straight")](item, folder)
                dist.barrier()


if __name__ == "__main__":
    main()
