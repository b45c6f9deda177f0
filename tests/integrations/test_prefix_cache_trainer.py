"""The prefix cache under the real Trainer: losses, evaluations, generated texts and weights have the bits of a run without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference.cached_runs import hits_of
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from workers import worker_hf

import smartfrz_ds

ROWS, BATCH, EPOCHS = 16, 4, 6
STEPS = ROWS // BATCH
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # the worst one is an early one


@pytest.fixture(autouse=True)
def accelerate_begins_anew() -> Iterator[None]:
    yield
    worker_hf.reset()


def bert() -> Any:
    """With dropout behind the border."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
    config = transformers.BertConfig(vocab_size=worker_hf.VOCABULARY, max_position_embeddings=16, **sizes)
    return transformers.BertForSequenceClassification(config)


class LoadsTheBest(TrainerCallback):
    """Goes back to the best checkpoint in mid-run, with the Trainer's own method; frozen layers get other weights than they have."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.moved = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step != 4 * STEPS or self.trainer is None:
            return
        frozen = self.trainer.freezer.controller.frozen
        before = {n: p.detach().clone() for n, p in model.named_parameters() if any(layer in n for layer in frozen)}
        self.trainer._load_best_model()
        after = dict(model.named_parameters())
        self.moved = max((after[n] - w).abs().max().item() for n, w in before.items())


class Generates(TrainerCallback):
    """After each evaluation: text, with a cache of keys and values."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        model.eval()
        with torch.no_grad():
            prompt = worker_hf.Texts("llama", 2)[0]["input_ids"][None, :4]
            made = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
        self.texts.append(made[0].tolist())


class WithReference(Trainer):
    """As DPO: in each step the reference is the same model with its adapter disabled, before the trained forward and after it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        def reference() -> Tensor:
            with torch.no_grad(), model.disable_adapter():
                return model(**inputs).logits

        first = reference()
        outputs = model(**inputs)
        assert torch.equal(first, reference())
        loss = outputs.loss + (outputs.logits - first).square().mean()
        return (loss, outputs) if return_outputs else loss


def trained(folder: Path, mode: str, model: Any, kind: str, *callbacks: TrainerCallback, resume: str = "", trainer: Any = Trainer) -> Any:
    worker_hf.reset()
    freezer = smartfrz_ds.FreezeCallback(**worker_hf.SETTINGS, cache={"mode": mode, "min_gain": 1, "memory": "16MiB"})
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    made = trainer(
        model=model,
        args=TrainingArguments(**arguments | BEST),
        train_dataset=worker_hf.Texts(kind, ROWS),
        eval_dataset=worker_hf.Texts(kind, 2 * BATCH),
        callbacks=[freezer, *callbacks],
    )
    made.freezer = freezer
    for callback in callbacks:
        if isinstance(callback, LoadsTheBest):
            callback.trainer = made
    made.train(resume_from_checkpoint=resume or None)
    return made


def history(trainer: Any, since: int = 0) -> list[tuple[int, float]]:
    """All losses, of training and of evaluation."""
    logged = [(x["step"], x[key]) for x in trainer.state.log_history for key in ("loss", "eval_loss") if key in x]
    return [x for x in logged if x[0] > since]


def same(one: Any, other: Any) -> bool:
    return history(one) == history(other) and all(
        torch.equal(x, y) for x, y in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )


def test_best_model_in_mid_run_evaluations_and_resume(tmp_path: Path) -> None:
    """load_best_model_at_end; the same load in mid-run, with other weights for frozen layers; and a resume from a checkpoint between."""
    runs, resumed = {}, {}
    for mode in ("off", "on"):
        best = LoadsTheBest()
        runs[mode] = trained(tmp_path / mode, mode, bert(), "bert", best)
        assert best.moved > 1e-3  # frozen after the best checkpoint was written: its rows are stale
        for step in (2 * STEPS, 4 * STEPS):
            again = trained(tmp_path / f"{mode}-{step}", mode, bert(), "bert", resume=str(tmp_path / mode / f"checkpoint-{step}"))
            resumed[mode, step] = again
    assert same(runs["off"], runs["on"])
    assert len(history(runs["on"])) == EPOCHS * STEPS + EPOCHS
    # frozen from step 6 on; stored again after the load
    assert hits_of(runs["on"].freezer.controller) > STEPS, runs["on"].freezer.controller.report().cache_note
    for step in (2 * STEPS, 4 * STEPS):
        assert same(resumed["off", step], resumed["on", step])
        assert hits_of(resumed["on", step].freezer.controller) >= 4 * STEPS - step + STEPS - 1
    # without the load, a resumed run is the straight one up to there
    assert history(resumed["on", 2 * STEPS])[: 3 * STEPS] == history(runs["off"])[: 3 * STEPS]


@pytest.mark.filterwarnings("ignore:smartfrz. other code has set requires_grad:RuntimeWarning")  # PEFT does, at the end of the block
def test_reference_passes_and_generation(tmp_path: Path) -> None:
    texts, runs = {}, {}
    for mode in ("off", "on"):
        generates = Generates()
        runs[mode] = trained(tmp_path / mode, mode, worker_hf.model_of("lora"), "lora", generates, trainer=WithReference)
        texts[mode] = generates.texts
    assert same(runs["off"], runs["on"])
    assert texts["off"] == texts["on"] and len(texts["on"]) == EPOCHS and len({tuple(x) for x in texts["on"]}) > 1
    assert hits_of(runs["on"].freezer.controller) > STEPS, runs["on"].freezer.controller.report().cache_note


class Noted(smartfrz_ds.HostSampler):
    """Notes the order of each epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.orders: list[list[int]] = []

    def __iter__(self) -> Iterator[int]:
        self.orders.append(list(super().__iter__()))
        return iter(self.orders[-1])


class OnItsHost(Trainer):
    """As docs/prefix-cache.md shows it."""

    sampler: Noted

    def _get_train_sampler(self, *_: Any) -> Any:
        self.sampler = Noted(self.train_dataset, seed=self.args.seed, batch_size=self.args.per_device_train_batch_size)
        return self.sampler


def test_sampler_of_hosts(tmp_path: Path) -> None:
    """The Trainer sets the sampler's epochs, in a resumed run too."""
    run = trained(tmp_path, "on", bert(), "bert", trainer=OnItsHost)
    expected = smartfrz_ds.HostSampler(range(ROWS), seed=0, batch_size=BATCH)
    for epoch, order in enumerate(run.sampler.orders):
        expected.set_epoch(epoch)
        assert order == list(expected)
    assert len(run.sampler.orders) == EPOCHS and hits_of(run.freezer.controller) >= 3 * STEPS - 1
    resume = str(tmp_path / f"checkpoint-{3 * STEPS}")
    again = trained(tmp_path / "again", "on", bert(), "bert", trainer=OnItsHost, resume=resume)
    assert again.sampler.orders[-3:] == run.sampler.orders[3:] and history(again) == history(run)
