"""Pre-trains a GPT in a DeepSpeed pipeline whose converged front layers freeze, and whose other layers then move to the freed stages.

    deepspeed --num_accelerators 4 launch/examples/pretrain_pipeline.py

reads the text of Python's documentation, which comes with Python; `--data DIR` takes a folder of text files. Settings of DeepSpeed and of
smartfrz_ds are in configs/pipeline.json. `--resume` continues from the last checkpoint in `--out`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from common import gpt_parser, one_line_errors, read_config, whole

# DeepSpeed and torch are imported where they are used: --help and a wrong option don't wait for them.

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "pipeline.json"
VALIDATION_BATCHES = 4  # of as many micro-batches as a step has


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = gpt_parser(__doc__, blocks=8, width=96, config=CONFIG, out=Path("runs/pipeline"))
    add = parser.add_argument
    add("--tokenizer", choices=("byte", "bpe"), default="byte", help="bpe learns its vocabulary from the text first")
    add("--vocabulary", type=whole(257), default=1024, help="tokens of bpe, at most; more than 256 (default: 1024)")
    add("--stages", type=whole(1), help="pipeline stages (default: one a rank; with fewer, the ranks make up replicas)")
    add("--micro-batches", type=whole(1), help="of a step (default: gradient_accumulation_steps in the JSON)")
    add("--validate-every", type=whole(1), metavar="STEPS", help="default: a tenth of the run")
    add("--save-every", type=whole(1), metavar="STEPS", help="default: a quarter of the run")
    text = "continue from the last complete checkpoint in DIR (default: in --out), perhaps one that `smartfrz reshape` has written"
    add("--resume", type=Path, nargs="?", const=Path(), metavar="DIR", help=text)
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the DeepSpeed JSON as a dict, with what the command line overrides. ValueError for what can't be."""
    if args.tokenizer == "bpe" and importlib.util.find_spec("tokenizers") is None:
        raise ValueError("--tokenizer bpe: the package 'tokenizers' is not installed: pip install -c constraints.txt -e '.[pretrain]'")
    config = read_config(args, stages=(0, 1))
    if args.micro_batches is not None:
        config["gradient_accumulation_steps"] = args.micro_batches
    return config


def tokens_of(texts: Any, args: argparse.Namespace, rank: int) -> tuple[Any, Any, int]:
    """Return tokens to train on and held out, (n,) int32, and the vocabulary's size. With bpe, rank 0 learns it, once a run; collective."""
    from data import as_tokens, load_bpe, train_bpe
    from torch.distributed import barrier

    encode, vocabulary = str.encode, 256  # bytes
    if args.tokenizer == "bpe":
        file = args.out / "tokenizer.json"
        if rank == 0 and not (args.resume is not None and file.exists()):
            train_bpe(texts.train, args.vocabulary, file)
        barrier()
        encode, vocabulary = load_bpe(file)
    train, held_out = as_tokens(texts.train, encode), as_tokens(texts.held_out, encode)
    if min(len(train), len(held_out)) <= args.length:
        counts = f"{len(train)} tokens to train on and {len(held_out)} held out"
        raise ValueError(f"--data: {counts}; --length {args.length} needs more of each")
    return train, held_out, vocabulary


def build(args: argparse.Namespace, config: dict[str, Any], vocabulary: int, world: int) -> Any:
    """Return the engine. Collective."""
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from model import Shape, loss_of, pipeline_layers

    import smartfrz_ds

    stages = args.stages or world
    if world % stages:
        fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(f"--stages {stages} with {world} ranks: allowed are {fitting}")
    if stages > args.blocks:
        raise ValueError(f"--stages {stages} with --blocks {args.blocks}: allowed are at most as many stages as blocks")
    module = PipelineModule(
        pipeline_layers(Shape(vocabulary=vocabulary, length=args.length, blocks=args.blocks, width=args.width)),
        num_stages=stages,
        loss_fn=loss_of,
        partition_method="type:Block",
        seed_layers=True,  # each with a seed of its own: the first weights don't depend on the number of stages
        seed_fn=lambda seed: torch.manual_seed(int(seed)),  # DeepSpeed adds a numpy integer to it
        base_seed=args.seed,
    )
    initialize = deepspeed.initialize if args.policy == "none" else smartfrz_ds.initialize
    return initialize(model=module, model_parameters=[p for p in module.parameters() if p.requires_grad], config=config)[0]


def resume(engine: Any, folder: Path, identity: dict[str, Any]) -> None:
    """Load the last complete checkpoint in a folder; ValueError if there is none, or if it belongs to another run."""
    path, client = engine.load_checkpoint(str(folder))
    if path is None:
        raise ValueError(f"--resume: no complete checkpoint in {folder}")
    was = client.get("pretraining", {})
    if other := [key for key, value in identity.items() if was.get(key) != value]:
        raise ValueError(f"--resume: the checkpoint in {folder} is of a run with another {', '.join(other)}")


def span(engine: Any) -> list[int]:
    """Return the first entry of the pipeline's list on this stage, and the one after its last."""
    return [int(bound) for bound in engine.module.parts[engine.stage_id : engine.stage_id + 2]]


def run(args: argparse.Namespace, config: dict[str, Any]) -> None:
    import deepspeed
    import torch.distributed as dist
    from data import read_texts, windows
    from table import StepLog, optimizer_bytes, sizes, table
    from tqdm import tqdm

    texts = read_texts(args.data)
    deepspeed.init_distributed(verbose=False)
    rank, world, checkpoints = dist.get_rank(), dist.get_world_size(), args.out / "checkpoints"
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0 and args.resume is None and "smartfrz" in config:
        Path(config["smartfrz"]["log_path"]).unlink(missing_ok=True)  # of an earlier run
    train, held_out, vocabulary = tokens_of(texts, args, rank)
    engine = build(args, config, vocabulary, world)
    # The settings and data that a resumed run must share.
    identity = {"data": texts.digest, **{key: getattr(args, key) for key in ("tokenizer", "length", "seed")}}
    if args.resume is not None:
        resume(engine, args.resume if args.resume.name else checkpoints, identity)
    controller, first = getattr(engine, "smartfrz", None), span(engine)
    start, last = int(engine.global_steps), min(args.steps, args.stop_after or args.steps)
    validate_every, save_every = args.validate_every or max(1, args.steps // 10), args.save_every or max(1, args.steps // 4)
    micro_batches, rows = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
    log = StepLog(range(start + 1, last + 1), controller, memory=partial(optimizer_bytes, engine))
    if rank == 0:
        left_out = f" ({texts.skipped} files are no UTF-8 text and were left out)" if texts.skipped else ""
        print(
            f"{len(train):,} tokens to train on, {len(held_out):,} held out{left_out}\n"
            f"{engine.module.parts[-1]} layers on {engine.num_stages} stages: {sizes(engine.module.parts)}\n"
            f"steps {start + 1} to {args.steps}, each of {micro_batches} micro-batches of {rows} × {args.length} tokens",
            flush=True,
        )

    def batch(tokens: Any, *draw: int) -> Any:
        """The micro-batches of one step of this replica; the same for the same `draw`, on every stage."""
        draws = [(args.seed, *draw, engine.grid.get_data_parallel_id(), micro) for micro in range(micro_batches)]
        return iter([windows(tokens, rows=rows, length=args.length, draw=draw) for draw in draws])

    for step in log.steps:
        with log.step() as seen:
            seen["loss"] = float(engine.train_batch(batch(train, 1, step)))
        if step % validate_every == 0 or step == last:
            found = fmean(float(engine.eval_batch(batch(held_out, 0, i))) for i in range(VALIDATION_BATCHES))
            log.series["validation_steps"].append(step)
            log.series["validation"].append(found)
            if rank == 0:
                tqdm.write(f"step {step}: loss {fmean(log.series['loss'][-20:]):.3f}, on held-out text {found:.3f}")
        if step % save_every == 0 or step == last:
            engine.save_checkpoint(str(checkpoints), client_state={"pretraining": identity})
            if rank == 0:
                tqdm.write(f"step {step}: checkpoint saved in {checkpoints}")

    tokens = micro_batches * rows * args.length * engine.dp_world_size
    result, every = log.result(scores={"loss on held-out text": found}, tokens=tokens), [None] * world
    layers = [list(layer.parameters()) for layer in engine.module.forward_funcs]
    frozen = sum(bool(params) and not any(p.requires_grad for p in params) for params in layers)
    own = {"stage": engine.stage_id, "start": first, "end": span(engine), "frozen": frozen, "bytes": result.optimizer_bytes}
    dist.all_gather_object(every, own)
    if rank == 0:
        result.stages.extend(every)
        result.save(args.out / "results.json")
        print(f"\n{table([result])}")
        if controller is not None and (advice := controller.report().width_note):
            print(f"\n{advice}")
        print(f"\nresults, events and checkpoints: {args.out}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    options = arguments()
    with one_line_errors():
        whole_config = settings(options)
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("this script is started by a launcher: deepspeed --num_accelerators 4 launch/examples/pretrain_pipeline.py …")
        run(options, whole_config)
