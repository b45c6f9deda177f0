"""The parts that all examples share: options, the DeepSpeed JSON, and errors of the user."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def whole(least: int, *, multiple_of: int = 1) -> Callable[[str], int]:
    """Return the type of an option that takes an integer >= `least`, divisible by `multiple_of`."""
    allowed = f"a whole number of at least {least}" + (f", a multiple of {multiple_of}" if multiple_of > 1 else "")

    def number(text: str) -> int:
        if int(text) < least or int(text) % multiple_of:
            raise argparse.ArgumentTypeError(f"got {text}; allowed: {allowed}")
        return int(text)

    return number


def positive(text: str) -> float:
    """Convert an option that takes a positive number."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a positive number")
    return float(text)


def parser_of(doc: str | None, *, config: Path | None = None, deepspeed: bool = True, **defaults: Any) -> argparse.ArgumentParser:
    """Create a parser with the options of all scripts.

    Args:
        doc: The script's description.
        config: Default of `--deepspeed_config`; None: the option is required.
        deepspeed: Whether the script has a DeepSpeed engine, with its settings in a JSON file.
        defaults: Of `policy`, `steps`, `lr` and `out`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if deepspeed:
        text = "JSON with a 'smartfrz' section"
        parser.add_argument("--deepspeed_config", type=Path, default=config, required=config is None, help=text)
        parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    for option, kind, text in (
        ("--policy", str, "a policy of smartfrz_ds, or 'none' for a run without freezing"),
        ("--steps", whole(1), "optimizer steps"),
        ("--lr", positive, "highest learning rate"),
        ("--out", Path, "output folder"),
    ):
        default = defaults.get(option[2:])
        otherwise = "nothing is written" if option == "--out" else "as in the JSON"
        parser.add_argument(option, type=kind, default=default, help=f"{text} (default: {default or otherwise})")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser


def gpt_parser(doc: str | None, *, blocks: int, width: int, **more: Any) -> argparse.ArgumentParser:
    """Create the same for a script that pre-trains model.py's GPT on data.py's text; `blocks` and `width` are defaults."""
    parser = parser_of(doc, **more)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of text files, UTF-8 (default: Python's documentation)")
    parser.add_argument("--length", type=whole(1), default=64, help="tokens per sequence (default: 64)")
    parser.add_argument("--blocks", type=whole(1), default=blocks, help="of the model (default: %(default)s)")
    parser.add_argument("--width", type=whole(4, multiple_of=4), default=width, help="of the model (default: %(default)s)")
    parser.add_argument("--stop-after", type=whole(1), metavar="STEP", help="save a checkpoint at this step and end")
    return parser


def read_config(args: argparse.Namespace, *, stages: tuple[int, ...]) -> dict[str, Any]:
    """Read the DeepSpeed JSON of `--deepspeed_config` and apply `--steps`, `--lr` and `--policy`; sets `args.steps`.

    Args:
        args: Options of `parser_of`.
        stages: The ZeRO stages that the script works with.

    Raises:
        ValueError: The file cannot be read, or lacks something that the script needs.
    """
    where = f"--deepspeed_config {args.deepspeed_config}"
    try:
        config: dict[str, Any] = json.loads(args.deepspeed_config.read_text())
        optimizer, schedule, _ = config["optimizer"]["params"], config["scheduler"]["params"], config["train_micro_batch_size_per_gpu"]
        steps, warmup = schedule["total_num_steps"], schedule["warmup_num_steps"]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{where}: {error} is missing; the files in configs/ show what this script reads") from error
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in stages:
        raise ValueError(f"{where}: zero_optimization.stage: got {stage}; allowed in this script: {', '.join(map(str, stages))}")
    if args.steps is not None:
        schedule |= {"total_num_steps": args.steps, "warmup_num_steps": min(warmup, max(1, args.steps // 10))}
    args.steps = args.steps or steps
    if args.lr is not None:
        optimizer["lr"] = schedule["warmup_max_lr"] = args.lr
    config.pop("train_batch_size", None)
    section = config.pop("smartfrz", {})
    if args.policy != "none":
        log = {} if args.out is None else {"log_path": str(args.out / "events.jsonl")}
        config["smartfrz"] = log | section | ({} if args.policy is None else {"policy": args.policy})
    return config


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End every rank with exit code 2 on an error of the user, with one line on the first rank of each host instead of a traceback."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
