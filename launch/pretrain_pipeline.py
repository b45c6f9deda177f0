"""Pre-trains a GPT in a DeepSpeed pipeline whose converged front layers freeze, and whose other layers then move to the freed stages.

    deepspeed --num_accelerators 4 launch/pretrain_pipeline.py

reads the text of Python's documentation, which comes with Python; `--data DIR` takes a folder of text files. Settings of DeepSpeed and of
smartfrz_ds are in configs/pipeline.json. `--resume` goes on from the last checkpoint in `--out`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "pipeline.json"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", type=Path, default=CONFIG, help="DeepSpeed JSON (default: configs/pipeline.json)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    data = parser.add_argument_group("text")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of text files, UTF-8 (default: Python's documentation)")
    data.add_argument("--tokenizer", choices=("byte", "bpe"), default="byte", help="bpe learns its vocabulary from the text first")
    data.add_argument("--vocabulary", type=int, default=1024, help="tokens of bpe, at most (default: 1024)")
    data.add_argument("--length", type=int, default=64, help="tokens of a text that are read at once (default: 64)")
    model = parser.add_argument_group("model")
    model.add_argument("--blocks", type=int, default=8, help="default: 8")
    model.add_argument("--width", type=int, default=96, help="default: 96")
    model.add_argument("--heads", type=int, default=4, help="heads of attention (default: 4)")
    model.add_argument("--tied", action="store_true", help="the head uses the weight of the token embedding")
    run = parser.add_argument_group("run")
    run.add_argument("--stages", type=int, help="pipeline stages (default: one a rank; with fewer, the ranks make up replicas)")
    run.add_argument("--recompute", type=int, default=0, metavar="N", help="activation checkpointing, every N layers (default: none)")
    run.add_argument("--steps", type=int, help="optimizer steps (default: the scheduler's total_num_steps in the JSON)")
    run.add_argument("--lr", type=float, help="highest learning rate (default: as in the JSON)")
    run.add_argument("--micro-batches", type=int, help="of a step (default: gradient_accumulation_steps in the JSON)")
    run.add_argument("--policy", help="who decides: a policy of smartfrz_ds, or 'none' for no freezing (default: as in the JSON)")
    run.add_argument("--rebalance", choices=("on_freeze", "off"), help="whether layers move after a freeze (default: as in the JSON)")
    run.add_argument("--validate-every", type=int, metavar="STEPS", help="default: a tenth of the run")
    run.add_argument("--save-every", type=int, metavar="STEPS", help="default: a quarter of the run")
    run.add_argument("--stop-after", type=int, metavar="STEP", help="save a checkpoint at this step and end")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, default=Path("runs/pipeline"), help="for checkpoints, events and results (default: runs/pipeline)")
    run.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="DIR",
        help="go on from the last complete checkpoint in DIR (default: in --out), perhaps one that `smartfrz reshape` has written",
    )
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON as a dict, with what the command line overrides. ValueError for what can't be."""
    for name in ("vocabulary", "length", "blocks", "width", "heads", "stages", "steps", "micro_batches", "validate_every", "save_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is a whole number of at least 1")
    if args.recompute < 0:
        raise ValueError(f"--recompute {args.recompute}: allowed is a whole number of at least 0")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr {args.lr}: allowed is a positive number")
    if args.width % args.heads:
        raise ValueError(f"--width {args.width} --heads {args.heads}: allowed is a width that the number of heads divides")
    if args.tokenizer == "bpe" and args.vocabulary <= 256:
        raise ValueError(f"--vocabulary {args.vocabulary}: allowed is more than 256, since each byte is a token")
    if args.tokenizer == "bpe" and importlib.util.find_spec("tokenizers") is None:
        raise ValueError("--tokenizer bpe: the package 'tokenizers' is not installed: pip install -c constraints.txt -e '.[pretrain]'")
    where = f"--deepspeed_config {args.deepspeed_config}"
    try:
        config: dict[str, Any] = json.loads(args.deepspeed_config.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: {error}") from error
    try:
        optimizer, schedule = config["optimizer"]["params"], config["scheduler"]["params"]
        if args.steps is not None:
            schedule["warmup_num_steps"] = min(schedule["warmup_num_steps"], max(1, args.steps // 10))
            schedule["total_num_steps"] = args.steps
        if args.lr is not None:
            optimizer["lr"] = schedule["warmup_max_lr"] = args.lr
        for section, key in ((schedule, "total_num_steps"), (config, "train_micro_batch_size_per_gpu")):
            section[key]
    except KeyError as error:
        raise ValueError(f"{where}: {error} is missing; configs/pipeline.json shows what this script reads") from error
    config.pop("train_batch_size", None)
    if args.micro_batches is not None:
        config["gradient_accumulation_steps"] = args.micro_batches
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1):
        raise ValueError(f"{where}: zero_optimization.stage: got {stage}; allowed in a pipeline: 0 or 1")
    # The default, reentrant checkpointing, does not work in a pipeline whose first layer is an embedding.
    pipeline = config.setdefault("pipeline", {})
    pipeline["use_reentrant"] = False
    if args.recompute:
        pipeline["activation_checkpoint_interval"] = args.recompute
    if args.policy == "none":
        config.pop("smartfrz", None)
        if args.rebalance:
            raise ValueError("--rebalance and --policy none: layers move only where they freeze")
    else:
        section = config.setdefault("smartfrz", {})
        if args.policy is not None:
            section["policy"] = args.policy
        if args.rebalance is not None:
            section.setdefault("pipeline", {})["rebalance"] = args.rebalance
        section.setdefault("log_path", str(args.out / "events.jsonl"))
    return config


def main() -> None:
    args = arguments()
    try:
        config = settings(args)
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("this script is started by a launcher: deepspeed --num_accelerators 4 launch/pretrain_pipeline.py …")
        from pipeline_run import run  # here, since it takes seconds: --help and a wrong option don't wait for it

        run(args, config)
    except ValueError as error:  # a user's mistake: one line says it, a traceback would hide it
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain_pipeline.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
