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
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}; allowed: a whole number of at least {least}")
        return int(text)

    return number


def positive(text: str) -> float:
    """Convert an option that takes a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a positive number")
    return number


def deepspeed_parser(doc: str | None, *, config: Path | None = None, out: Path | None) -> argparse.ArgumentParser:
    """Create a parser with the options that the scripts with a DeepSpeed engine share.

    Args:
        doc: The script's description.
        config: Default of `--deepspeed_config`; None: the option is required.
        out: Default of `--out`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "DeepSpeed JSON with a 'smartfrz' section" + (f" (default: configs/{config.name})" if config else "")
    parser.add_argument("--deepspeed_config", type=Path, default=config, required=config is None, help=text)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--policy", help="a policy of smartfrz_ds, or 'none' for a run without freezing (default: as in the JSON)")
    parser.add_argument("--steps", type=whole(1), help="optimizer steps (default: the scheduler's total_num_steps in the JSON)")
    parser.add_argument("--lr", type=positive, help="highest learning rate (default: as in the JSON)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=out, help=f"output folder (default: {out or 'nothing is written'})")
    return parser


def gpt_options(parser: argparse.ArgumentParser, *, blocks: int, width: int) -> None:
    """Add the options of a script that pre-trains model.py's GPT on data.py's text, with these defaults."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of text files, UTF-8 (default: Python's documentation)")
    parser.add_argument("--length", type=whole(1), default=64, help="tokens per sequence (default: 64)")
    parser.add_argument("--blocks", type=whole(1), default=blocks, help=f"default: {blocks}")
    parser.add_argument("--width", type=whole(1), default=width, help=f"default: {width}")
    parser.add_argument("--heads", type=whole(1), default=4, help="heads of attention, a divisor of the width (default: 4)")
    parser.add_argument("--stop-after", type=whole(1), metavar="STEP", help="save a checkpoint at this step and end")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the options, and check the shape of the model."""
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} --heads {args.heads}: allowed is a width that the number of heads divides")
    return args


def read_config(args: argparse.Namespace, *, stages: tuple[int, ...]) -> dict[str, Any]:
    """The DeepSpeed JSON of `--deepspeed_config` with what the command line overrides (`--steps`, `--lr`, `--policy`).

    Args:
        stages: the ZeRO stages that the script works with.

    Raises:
        ValueError: the file can't be read, or lacks something that the script needs.
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
        steps, warmup = args.steps, min(warmup, max(1, args.steps // 10))
    schedule |= {"total_num_steps": steps, "warmup_num_steps": warmup}
    if args.lr is not None:
        optimizer["lr"] = schedule["warmup_max_lr"] = args.lr
    config.pop("train_batch_size", None)
    section = config.pop("smartfrz", {})
    if args.policy != "none":
        policy = {} if args.policy is None else {"policy": args.policy}
        log = {} if args.out is None else {"log_path": str(args.out / "events.jsonl")}
        config["smartfrz"] = log | section | policy
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
