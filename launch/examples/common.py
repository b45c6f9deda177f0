"""The parts that all examples share: options, the DeepSpeed JSON, errors of the user, the progress bar."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def whole(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes an integer >= `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}; allowed: a whole number of at least {least}")
        return int(text)

    return number


def positive(text: str) -> float:
    """Convert an option that takes a positive number."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a positive number")
    return float(text)


def parser_of(
    doc: str | None, *, out: Path | None, config: Path | None = None, deepspeed: bool = True, **defaults: Any
) -> argparse.ArgumentParser:
    """Create a parser with the options that the scripts share.

    Args:
        doc: The script's description.
        out: Default of `--out`.
        config: Default of `--deepspeed_config`; None: the option is required.
        deepspeed: Whether the script has a DeepSpeed engine, with its settings in a JSON file.
        defaults: Of `policy`, `steps` and `lr`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    if deepspeed:
        add("--deepspeed_config", type=Path, default=config, required=config is None, help="JSON with a 'smartfrz' section")
        add("--local_rank", type=int, default=-1, help="set by the launcher")
    settings = {
        "--policy": (str, "a policy of smartfrz_ds, or 'none' for a run without freezing"),
        "--steps": (whole(1), "optimizer steps"),
        "--lr": (positive, "highest learning rate"),
    }
    for name, (kind, text) in settings.items():
        default = defaults.get(name[2:])
        add(name, type=kind, default=default, help=f"{text} (default: {default or 'as in the JSON'})")
    add("--seed", type=int, default=0, help="default: 0")
    add("--out", type=Path, default=out, help=f"output folder (default: {out or 'nothing is written'})")
    return parser


def gpt_parser(doc: str | None, *, blocks: int, width: int, **more: Any) -> argparse.ArgumentParser:
    """Create the same for a script that pre-trains model.py's GPT on data.py's text; `blocks` and `width` are defaults."""
    parser = parser_of(doc, **more)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of text files, UTF-8 (default: Python's documentation)")
    for name, size in {"--length": 64, "--blocks": blocks, "--width": width, "--heads": 4}.items():
        parser.add_argument(name, type=whole(1), default=size, help="of the model (default: %(default)s)")
    parser.add_argument("--stop-after", type=whole(1), metavar="STEP", help="save a checkpoint at this step and end")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the options, and check the shape of the model."""
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} --heads {args.heads}: allowed is a width that the number of heads divides")
    return args


def read_config(args: argparse.Namespace, *, stages: tuple[int, ...]) -> dict[str, Any]:
    """Read the DeepSpeed JSON of `--deepspeed_config` and apply `--steps`, `--lr` and `--policy`; sets `args.steps`.

    Args:
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


def bar(steps: int, *, done: int = 0, rank: int) -> Any:
    """Create the progress bar of a run: shown on rank 0, and redrawn rarely if the output is a file."""
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, disable=rank != 0, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15.0)
