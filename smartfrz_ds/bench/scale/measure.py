"""Measures one cell of `smartfrz bench scale`: this process plays rank 0 of a process group that sends nothing.

torch's "fake" process group answers every collective with this rank's own data, as if all ranks said the same. What is timed is the
package's own code: the assembled parts of a run over a backend on paper (on_paper.py).
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from smartfrz_ds.backends import memory
from smartfrz_ds.backends.deepspeed.flat.group_state import tensors_of
from smartfrz_ds.backends.deepspeed.flat.kept import Kept
from smartfrz_ds.backends.deepspeed.flat.partition import STAGING_BYTES
from smartfrz_ds.backends.deepspeed.zero12 import gradient_tables
from smartfrz_ds.backends.memory import FreeMemory
from smartfrz_ds.checkpoint.files import pack
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.planner import LayerCost, best_cut
from smartfrz_ds.runtime.assembly import Parts, assemble
from smartfrz_ds.runtime.observers.protocol import LayoutChange

from .on_paper import OnPaper, StageOnPaper, Zero3OnPaper, Zero12OnPaper
from .shapes import Decoder, Shape

ENGINES = ("zero-1", "zero-2", "zero-3", "pipeline")
STAGES = 8  # of a pipeline; the other ranks are replicas
WINDOW = 30


def measure(shape: Shape, world: int, engine: str, repeats: int = 5) -> dict[str, Any]:
    """Measure one model on one number of ranks.

    Args:
        shape: Sizes of the model.
        world: Number of ranks, at least `STAGES` for a pipeline.
        engine: One of `ENGINES`.
        repeats: How often each part is timed; the fastest counts.

    Returns:
        Seconds of this process's CPU time, bytes, and numbers of collectives.
    """
    with ranks(world), unknown_memory():
        model = Decoder(shape)
        backend = backend_of(model, engine, world)
        settings = FreezeConfig(
            policy="attention", snapshot_interval=1, freeze_interval=10, total_steps=1000, dry_run=True, keep_state=100, window=WINDOW
        )
        parts = assemble(
            model,
            backend,
            settings,
            scheduler=None,
            monitor=None,
            probe_batch=None,
            version="",
            defer_policy=False,
        )
        try:
            return {"layers": len(parts.run.layers), "params": len(list(model.parameters()))} | Cell(parts, backend, repeats).measure()
        finally:
            for observer in parts.observers:
                observer.remove()


def backend_of(model: nn.Module, engine: str, world: int) -> OnPaper:
    """Build the backend of rank 0; in a pipeline, of a stage half of which freezes with the front half of the model."""
    params = list(model.parameters())
    everyone = dist.group.WORLD
    assert everyone is not None
    if engine == "zero-3":
        return Zero3OnPaper(model, params)
    if engine != "pipeline":
        return Zero12OnPaper(model, params, everyone, gradients=engine == "zero-1")
    blocks: Any = model.layers
    each, middle = len(blocks) // STAGES, len(blocks) // 2
    held = [p for block in blocks[middle - each // 2 : middle - each // 2 + each] for p in block.parameters()]
    replicas = dist.new_group(list(range(world // STAGES)))
    return StageOnPaper(model, held, replicas, gradients=False)


class Cell:
    """The measurements of one run on paper."""

    def __init__(self, parts: Parts, backend: OnPaper, repeats: int) -> None:
        self.parts, self.backend, self.repeats = parts, backend, repeats
        run = parts.run
        self.half = {layer.name for layer in run.layers[: len(run.layers) // 2]}
        parts.freezer.tell(LayoutChange(kind="start", frozen=frozenset()))
        for _ in range(WINDOW):
            run.state.step += 1
            parts.recording.after_step()

    def measure(self) -> dict[str, Any]:
        """Measure everything, part by part."""
        parts, row = self.parts, Row(self.repeats)
        row.add("snapshot", parts.recording.after_step)
        judged = self._predictor_seconds()
        row.add("stage", lambda: parts.policy.judge(frozenset()))
        row.values["predictor_s"] = min(judged)
        row.add("plan", self.plan)
        row.add("checkpoint", self.checkpoint)
        if self.backend.is_pipeline:
            row.add("cut", self.cut)
        gone = parts.freezer.leaving(self.half)
        need = self.backend.memory_need([p for p in gone if p in self.known], (), keep=True)
        cost = self.backend.change_cost(set(gone), keep=True)
        row.values |= {
            "moved_bytes": cost.moved_bytes,
            "busiest_bytes": cost.busiest_bytes,
            "exchanges": cost.exchanges,
            "device_bytes": need.device,
            "host_bytes": need.host,
        }
        return row.values

    @property
    def known(self) -> set[nn.Parameter]:
        """The parameters of this rank's optimizer."""
        return {p for group in self.backend.groups for p in group}

    def plan(self) -> None:
        """Plan a freeze of the front half as the freezer and the backend do: all checks, then the moves of each tensor."""
        backend = self.backend
        backend.layouts = [backend.layout(i, group) for i, group in enumerate(backend.groups)]  # which remember no plan
        change = self.parts.freezer.prepare(self.half, "freeze")
        gone = set(change.freeze)
        new, changed, _ = backend.plan_change(gone)
        self.moves = {index: backend.plan_group(index, new[index], gone) for index in changed}
        for index, moves in self.moves.items():
            for tensor in tensors_of(backend.master(index), backend.base_optimizer()).values():
                moves.stay.rounds_of(moves.rank, moves.old.world, STAGING_BYTES // tensor.element_size())
            if not isinstance(backend, Zero3OnPaper):
                gradient_tables(new[index], {id(p): k for k, p in enumerate(new[index].params)})

    def checkpoint(self) -> None:
        """Prepare what a checkpoint holds after that freeze: this rank's kept state as JSON, and the freeze state."""
        backend = self.backend
        for index, moves in self.moves.items():
            kept = Kept(moves.kept)
            kept.tensors = tensors_of(backend.master(index), backend.base_optimizer())
            leaving = list(moves.kept.pieces)
            kept.step = dict.fromkeys(leaving, torch.tensor(3.0))
            backend.keep(dict.fromkeys(leaving, kept))
        saved = backend.kept_state()
        text = json.dumps(None if saved is None else saved[0])
        self.parts.run.ranks.gather_bytes(text.encode()[:64].ljust(64))  # as the digests of the files
        pack(self.parts.freeze_state.state_dict())

    def cut(self) -> None:
        """Find the bounds of the stages after that freeze, on rank 0."""
        costs = [LayerCost(forward=1.0, backward_input=1.0, backward_weight=1.0) for _ in self.parts.run.layers]
        best_cut(costs, STAGES, 4 * STAGES, len(self.half))

    def _predictor_seconds(self) -> list[float]:
        """Time the predictor's own forwards from now on; they are appended to the list."""
        model: Any = self.parts.policy.policy
        judge, seconds = model._model.probabilities, []

        def timed(batch: Any) -> Any:
            began = time.process_time()
            answer = judge(batch)
            seconds.append(time.process_time() - began)
            return answer

        model._model.probabilities = timed
        return seconds


class Row:
    """Collectives, executed bytecodes and seconds of each part. repeats: how often it is timed."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.values: dict[str, Any] = {}

    def add(self, name: str, action: Callable[[], object]) -> None:
        """Count the collectives of one call and the bytecodes of another, then time `repeats` of them."""
        with counted_collectives() as calls:
            action()
        self.values[f"{name}_collectives"] = len(calls)
        self.values[f"{name}_work"] = executed_bytecodes(action)
        seconds = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(self.repeats):
                began = time.process_time()
                action()
                seconds.append(time.process_time() - began)
        finally:
            gc.enable()
        self.values[f"{name}_s"] = min(seconds)


def executed_bytecodes(action: Callable[[], object]) -> int:
    """Return how many Python bytecodes a call executes: its work without the noise of a clock, and without what runs in C."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """Be rank 0 of this many, in a process group that sends nothing.

    Raises:
        RuntimeError: This process has a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("bench scale: this process has a process group already; allowed: a process of its own")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def unknown_memory() -> Iterator[None]:
    """Let nothing be refused for this machine's memory: what is planned is a cluster."""
    known = memory.free_memory
    vars(memory)["free_memory"] = lambda device: FreeMemory()
    try:
        yield
    finally:
        vars(memory)["free_memory"] = known


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Note the name of each collective of torch.distributed within the block."""
    names = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all_single")
    seen: list[str] = []
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, noting(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
