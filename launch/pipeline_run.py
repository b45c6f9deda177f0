"""The run behind launch/pretrain_pipeline.py: data, engine, training, and the table at its end."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from gpt_pipeline import gpt, loss_of
from results import Measured, before_and_after
from texts import BYTES, Texts, as_bytes, as_tokens, load_bpe, python_docs, read_folder, train_bpe, windows
from torch import Tensor
from tqdm import tqdm

import smartfrz_ds

SKIPPED_STEPS = 3  # the first steps build the optimizer's state and send shapes
VALIDATION_BATCHES = 4  # of as many micro-batches as a step has


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run, or what was left of it after a resume.

    policy: its name, "none" without freezing. steps, first_step: of the whole run, and the first one of this part.
    names: of the layers. frozen: [layer, step] in the order of freezing, of the whole run. moves: [step, bounds, predicted gain], likewise.
    bounds: of the stages in the pipeline's list of entries, at the start of this part and at its end. frozen_entries: of that list.
    step_seconds: median wall time of a step, before the first freeze and after the last change; timed_steps: steps behind them.
    tokens: of a step. optimizer_bytes: of each rank, live optimizer tensors, before and after.
    train_loss: mean of the last 20 steps. validation: [step, loss on held-out text].
    """

    policy: str
    steps: int
    first_step: int
    names: list[str]
    frozen: list[tuple[str, int]]
    moves: list[tuple[int, list[int], float]]
    bounds: tuple[list[int], list[int]]
    frozen_entries: list[int]
    step_seconds: Measured
    timed_steps: Measured
    tokens: int
    optimizer_bytes: tuple[list[int], list[int]]
    train_loss: float
    train_seconds: float
    plugin_seconds: float = 0.0
    pause_seconds: float = 0.0
    saved_flops_fraction: float = 0.0
    validation: list[tuple[int, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Data:
    """(n,) int32 tokens to train on and held out; vocabulary: how many different ones there are."""

    train: Tensor
    held_out: Tensor
    vocabulary: int


def tokens_of(texts: Texts, args: argparse.Namespace) -> Data:
    """Collective: with bpe, rank 0 learns the vocabulary. A resumed run takes the one that is there."""
    encode, vocabulary = as_bytes, BYTES
    if args.tokenizer == "bpe":
        file = args.out / "tokenizer.json"
        if dist.get_rank() == 0 and not (args.resume is not None and file.exists()):
            train_bpe(texts.train, args.vocabulary, file)
        dist.barrier()
        encode, vocabulary = load_bpe(file)
    data = Data(train=as_tokens(texts.train, encode), held_out=as_tokens(texts.held_out, encode), vocabulary=vocabulary)
    if min(len(data.train), len(data.held_out)) <= args.length:
        raise ValueError(
            f"--data: {len(data.train)} tokens to train on and {len(data.held_out)} held out; --length {args.length} needs more of each"
        )
    return data


def stages_of(args: argparse.Namespace) -> int:
    world, entries = dist.get_world_size(), args.blocks + 4
    stages = args.stages or world
    if world % stages:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(f"--stages {stages} with {world} ranks: allowed are {', '.join(map(str, fitting))}")
    if stages > args.blocks:
        raise ValueError(
            f"--stages {stages} with --blocks {args.blocks} ({entries} layers in all): allowed are at most as many stages as blocks"
        )
    return stages


class Run:
    """Everything before the first step. Collective. ValueError for what a user wrote."""

    def __init__(self, args: argparse.Namespace, config: dict[str, Any]) -> None:
        self.args, self.config = args, config
        texts = python_docs() if args.data is None else read_folder(args.data)
        deepspeed.init_distributed(verbose=False)
        stages = stages_of(args)
        self.rank, self.replicas = dist.get_rank(), dist.get_world_size() // stages
        args.out.mkdir(parents=True, exist_ok=True)
        if self.rank == 0 and args.resume is None:
            Path(config.get("smartfrz", {}).get("log_path", os.devnull)).unlink(missing_ok=True)  # of an earlier run
        self.data = tokens_of(texts, args)
        layers = gpt(
            vocabulary=self.data.vocabulary, length=args.length, blocks=args.blocks, width=args.width, heads=args.heads, tied=args.tied
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seed and what each stage holds
            # A seed for each layer: the first weights don't depend on the number of stages.
            module = PipelineModule(
                layers,
                num_stages=stages,
                loss_fn=loss_of,
                partition_method="type:Block",
                seed_layers=True,
                seed_fn=seeded,
                base_seed=args.seed,
            )
        initialize = deepspeed.initialize if args.policy == "none" else smartfrz_ds.initialize
        params = [p for p in module.parameters() if p.requires_grad]
        self.engine: Any = initialize(model=module, model_parameters=params, config=config)[0]
        self.controller: smartfrz_ds.Controller | None = getattr(self.engine, "smartfrz", None)
        self.steps = int(config["scheduler"]["params"]["total_num_steps"])
        self.micro_batches, self.rows = self.engine.gradient_accumulation_steps(), self.engine.train_micro_batch_size_per_gpu()
        self.tokens = self.micro_batches * self.rows * args.length * self.replicas
        self.replica = self.engine.grid.get_data_parallel_id()
        # What makes a run this run and no other.
        self.identity = {"data": texts.digest, **{key: getattr(args, key) for key in ("tokenizer", "length", "seed")}}
        self.start = 0 if args.resume is None else self._resumed(args.resume if args.resume.name else self.checkpoints)
        if self.rank == 0:
            left_out = f" ({texts.skipped} files are no UTF-8 text and were left out)" if texts.skipped else ""
            copies = f" × {self.replicas} replicas" if self.replicas > 1 else ""
            print(
                f"{len(self.data.train):,} tokens to train on, {len(self.data.held_out):,} held out{left_out}\n"
                f"{self._weights():,} weights, {len(layers)} layers on {stages} stages{copies}: {sizes(self.bounds)}\n"
                f"steps {self.start + 1} to {self.steps}, each of {self.micro_batches} micro-batches of {self.rows} × {args.length} tokens",
                flush=True,
            )

    @property
    def checkpoints(self) -> Path:
        return Path(self.args.out) / "checkpoints"

    @property
    def bounds(self) -> list[int]:
        """Where the stages begin and end in the list of layers."""
        return [int(bound) for bound in self.engine.module.parts]

    def batch(self, what: Tensor, *draw: int) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of one step of this replica; the same for the same `draw`, on every stage."""
        return [
            windows(what, rows=self.rows, length=self.args.length, draw=(self.args.seed, *draw, self.replica, m))
            for m in range(self.micro_batches)
        ]

    def validate(self) -> float:
        """Loss on held-out text, always the same. Collective."""
        losses = [self.engine.eval_batch(iter(self.batch(self.data.held_out, 0, i))) for i in range(VALIDATION_BATCHES)]
        return fmean(float(loss) for loss in losses)

    def save(self, step: int) -> None:
        self.engine.save_checkpoint(str(self.checkpoints), client_state={"pretraining": self.identity})
        if self.rank == 0:
            tqdm.write(f"step {step}: checkpoint saved in {self.checkpoints}")

    def optimizer_bytes(self) -> list[int]:
        """Of each rank."""
        own = 0 if self.controller is None else self.controller.report().optimizer_bytes
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return every

    def frozen_entries(self, frozen: tuple[str, ...]) -> list[int]:
        """Of the pipeline's list: those of these layers. A layer's name is that of its entry but for the first and the last."""
        entries, blocks = range(self.args.blocks + 4), {f"layers.{i}": [i] for i in range(2, self.args.blocks + 2)}
        where = blocks | {"embeddings": [0, 1], "head": list(entries[-2:])}
        return [i for name in frozen for i in where[name]]

    def _resumed(self, folder: Path) -> int:
        path, client = self.engine.load_checkpoint(str(folder))
        if path is None:
            raise ValueError(f"--resume: no complete checkpoint in {folder}")
        was = client.get("pretraining")
        other = [key for key, value in self.identity.items() if was is None or was.get(key) != value]
        if other:
            raise ValueError(f"--resume: the checkpoint in {folder} is of a run with another {', '.join(other)}")
        return int(self.engine.global_steps)

    def _weights(self) -> int:
        module = self.engine.module
        return sum(p.numel() for spec in module._layer_specs for p in _first_use(spec, module._layer_specs))


def _first_use(spec: Any, specs: list[Any]) -> list[Any]:
    """The parameters of one layer of the list, built once more to be counted; none where a tied layer comes again."""
    key = getattr(spec, "key", None)
    if key is not None and next(s for s in specs if getattr(s, "key", None) == key) is not spec:
        return []
    with torch.random.fork_rng(devices=[]):  # built on the CPU
        return list(spec.build().parameters())


def seeded(seed: int) -> None:
    """Before each layer is built."""
    torch.manual_seed(int(seed))  # DeepSpeed adds a numpy integer to it


def train(run: Run) -> Result:
    """From the run's first step to its last. Collective; rank 0 shows the bar."""
    engine, controller, args = run.engine, run.controller, run.args
    last = min(run.steps, args.stop_after or run.steps)
    validate_every, save_every = args.validate_every or max(1, run.steps // 10), args.save_every or max(1, run.steps // 4)
    seconds: list[float] = []
    losses: list[float] = []
    validation: list[tuple[int, float]] = []
    first_bounds, held = run.bounds, [0]
    events_before = 0 if controller is None else len(controller.report().events)
    shown = "-"
    bar = tqdm(total=run.steps, initial=run.start, disable=run.rank != 0, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15.0)
    begin = time.perf_counter()
    for step in range(run.start + 1, last + 1):
        began = time.perf_counter()
        losses.append(float(engine.train_batch(iter(run.batch(run.data.train, 1, step)))))
        seconds.append(time.perf_counter() - began)
        if step == run.start + 1:
            held = run.optimizer_bytes()
        state = "off"
        if controller is not None:
            report = controller.report()
            for event in report.events[events_before:]:
                if run.rank == 0:
                    tell(event, first_bounds)
            events_before = len(report.events)
            state = f"{len(report.frozen)}/{len(report.layers)}"
        if step % validate_every == 0 or step == last:
            validation.append((step, run.validate()))
            shown = f"{validation[-1][1]:.3f}"
            if run.rank == 0:
                tqdm.write(f"step {step}: loss {fmean(losses[-20:]):.3f}, on held-out text {shown}")
        if step % save_every == 0 or step == last:
            run.save(step)
        bar.set_postfix({"loss": f"{losses[-1]:.3f}", "held out": shown, "frozen": state}, refresh=False)
        bar.update()
    bar.close()
    took = time.perf_counter() - begin
    return _result(run, first_bounds, held, seconds, losses, validation, took)


def _result(
    run: Run,
    first_bounds: list[int],
    held: list[int],
    seconds: list[float],
    losses: list[float],
    validation: list[tuple[int, float]],
    took: float,
) -> Result:
    report = None if run.controller is None else run.controller.report()
    events = () if report is None else report.events
    frozen = [(name, e.step) for e in events if e.kind == "freeze" for name in e.layers]
    moves = [(e.step, list(e.bounds), e.gain) for e in events if e.kind == "rebalance"]
    # Steps of this part, counted from 1, after which the layout changed; the next one sends shapes anew.
    changed = {e.step - run.start for e in events if e.kind in ("freeze", "thaw", "rebalance") and e.step > run.start}
    whole_run = run.start > 0 and bool(frozen) and min(step for _, step in frozen) <= run.start
    last = max((step for step in changed if step < len(seconds)), default=0 if whole_run else None)
    step_seconds, timed = before_and_after(
        seconds,
        0 if whole_run else min(changed, default=None),
        last,
        skip=SKIPPED_STEPS,
        leave_out=changed | {step + 1 for step in changed},
    )
    return Result(
        policy="none" if run.controller is None else run.controller.config.policy,
        steps=run.steps,
        first_step=run.start + 1,
        names=[] if report is None else list(report.layers),
        frozen=frozen,
        moves=moves,
        bounds=(first_bounds, run.bounds),
        frozen_entries=[] if run.controller is None else run.frozen_entries(run.controller.frozen),
        step_seconds=step_seconds,
        timed_steps=timed,
        tokens=run.tokens,
        optimizer_bytes=(held, run.optimizer_bytes()),
        train_loss=fmean(losses[-20:]),
        train_seconds=took,
        plugin_seconds=0.0 if report is None else report.plugin_seconds - report.freeze_seconds,
        pause_seconds=0.0 if report is None else report.freeze_seconds,
        saved_flops_fraction=0.0 if report is None else report.saved_flops_fraction,
        validation=validation,
    )


def tell(event: Any, bounds: list[int]) -> None:
    """One line for what has just happened."""
    if event.kind == "rebalance":
        tqdm.write(
            f"step {event.step}: layers moved, the stages hold {sizes(event.bounds)} now; a step should be {event.gain:.2f} times as fast; "
            f"{event.moved_bytes / 1e6:.2f} MB in {event.seconds:.2f} s"
        )
    elif event.kind == "warning":
        tqdm.write(f"step {event.step}: {event.message}")
    elif event.layers:  # a decision names layers only in a dry run
        tqdm.write(f"step {event.step}: {event.kind} {', '.join(event.layers)}; {event.bytes_released_total / 1e6:.2f} MB released")


def sizes(bounds: list[int] | tuple[int, ...]) -> str:
    """How many layers each stage holds: 3+2+3."""
    return "+".join(str(b - a) for a, b in pairwise(bounds))


def table(result: Result) -> str:
    """The result as text; `a -> b`: before the first freeze -> after the last change."""
    before, after = result.step_seconds.before, result.step_seconds.after

    def pair(show: Any) -> str:
        known = [x for x in (before, after) if x is not None and x == x]  # NaN: no such step
        return " -> ".join(show(x) for x in known) if known else "-"

    rows = [
        ("policy", result.policy),
        ("steps", f"{result.first_step} to {result.steps}" if result.first_step > 1 else str(result.steps)),
        ("loss, last 20 steps", f"{result.train_loss:.4f}"),
        ("loss on held-out text", f"{result.validation[-1][1]:.4f}" if result.validation else "-"),
        ("time per step, median", pair(lambda s: f"{s * 1e3:.0f} ms")),
        (
            "  steps behind that median",
            " -> ".join(f"{n:.0f}" for n in (result.timed_steps.before, result.timed_steps.after) if n is not None),
        ),
        ("tokens per second", pair(lambda s: f"{result.tokens / s:,.0f}")),
        ("whole training", f"{result.train_seconds:.1f} s"),
    ]
    if result.policy != "none":
        rows += [
            ("arithmetic saved, whole run", f"{result.saved_flops_fraction:.1%}"),
            ("plugin's share of the time", f"{result.plugin_seconds / result.train_seconds:.2%}"),
            ("pause for freezes and moves", f"{result.pause_seconds:.2f} s in all"),
        ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    lines.insert(1, "-" * (width + 30))
    return "\n".join([*lines, "", *_stages(result), "", *_story(result)])


def _stages(result: Result) -> list[str]:
    """Which stage holds what."""
    start, end = result.bounds
    stages = len(start) - 1
    ranks = [range(s * len(result.optimizer_bytes[0]) // stages, (s + 1) * len(result.optimizer_bytes[0]) // stages) for s in range(stages)]
    rows = [["stage", "entries at the start", "at the end", "of them frozen", "optimizer of its ranks, MB"]]
    for stage in range(stages):
        held = [", ".join(f"{result.optimizer_bytes[when][rank] / 1e6:.2f}" for rank in ranks[stage]) for when in (0, 1)]
        cells = [f"{b[stage]}-{b[stage + 1] - 1} ({b[stage + 1] - b[stage]})" for b in (start, end)]
        still = sum(end[stage] <= entry < end[stage + 1] for entry in result.frozen_entries)
        rows.append([str(stage), *cells, str(still), f"{held[0]} -> {held[1]}"])
    if result.policy == "none":  # nobody counted
        rows = [row[:2] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _story(result: Result) -> list[str]:
    """What froze and moved, and when."""
    if result.policy == "none":
        return ["The same training without freezing."]
    happened: dict[int, list[str]] = {}
    for name, step in result.frozen:
        happened.setdefault(step, []).append(name)
    if not happened:
        return [f"Nothing froze in {result.steps} steps, so every number above is that of an ordinary run."]
    lines = {step: f"froze {', '.join(names)}" for step, names in happened.items()}
    for step, bounds, gain in result.moves:
        moved = f"stages of {sizes(bounds)} layers, {gain:.2f}x predicted"
        lines[step] = f"{lines[step]}; {moved}" if step in lines else moved
    return [f"{len(result.frozen)} of {len(result.names)} layers froze:", *(f"  step {step:>5}: {lines[step]}" for step in sorted(lines))]


def run(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """The whole of it."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # third parties' notes to their own developers
    made = Run(args, config)
    result = train(made)
    if dist.get_rank() == 0:
        result.save(args.out / "results.json")
        print(f"\n{table(result)}")
        if made.controller is not None and (advice := made.controller.report().width_note):
            print(f"\n{advice}")
        print(f"\nresults, events and checkpoints: {args.out}")
    dist.barrier()
    dist.destroy_process_group()
