"""Other code that reads the engine's memory while layers freeze: saves in flight, shared weights, callbacks. For test_readers_run.py."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference import oracle
from reference.async_saves import NoCopy, SlowStager, SlowWriter, copied, differing, open_later
from reference.torch_models import made, refusal, steps
from torch.distributed.checkpoint.state_dict import get_state_dict
from workers import ranks
from workers.worker_exact import engine_for

STAGES = {"z0": 0, "z1": 1, "z2": 2, "z3": 3}


class Run:
    """An engine of DeepSpeed, or a model in FSDP2, that trains."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.kind = kind
        if kind in STAGES:
            cell = oracle.Cell(kind, STAGES[kind], config={"smartfrz": settings})
            self.engine = engine_for(cell, oracle.Net())[0]
            self.controller, self.model = self.engine.smartfrz, self.engine.module
        else:
            self.model, self.optimizer, self.controller = made(kind, **settings)

    def train(self, numbers: range) -> None:
        if self.kind not in STAGES:
            steps(self.model, self.optimizer, numbers)
            return
        for step in numbers:
            self.engine.backward(oracle.loss_of(self.engine, *oracle.data(step, 0, dist.get_rank()), "fp32"))
            self.engine.step()

    def state(self) -> dict[str, Any]:
        """Live tensors: what a script hands to async_save."""
        if self.kind == "fsdp2":
            return dict(zip(("model", "optim"), get_state_dict(self.model, self.optimizer), strict=True))
        own = self.engine.smartfrz.backend
        rank = dist.get_rank()
        masters = {f"{rank}.{i}": t for i, t in enumerate(own.masters())}
        moments = {f"{rank}.{i}.{k}": v for i, s in enumerate(own.base_optimizer().state.values()) for k, v in s.items() if v.ndim}
        weights = {f"{rank}.{n}": getattr(p, "ds_tensor", p).detach() for n, p in self.model.named_parameters()}
        return {"model": weights, "masters": masters, "moments": moments}

    def end(self) -> None:
        (self.engine.destroy if self.kind in STAGES else self.controller.detach)()


def in_flight(folder: Path, kind: str, group: Any, *, copies: bool) -> dict[str, Any]:
    """A freeze while a save is being staged, or (copies=False) while it is written without having been copied."""
    run = Run(kind)
    run.train(range(2))
    gate, state = threading.Event(), run.state()
    saved, where = copied(state), folder / f"{kind}-{copies}"
    if copies:
        stager = SlowStager(gate)
        response = dcp.async_save(state, checkpoint_id=where, async_stager=stager, process_group=group)
        reads, ends = response.staging_completion, response.upload_completion
    else:
        reads = ends = dcp.async_save(state, storage_writer=SlowWriter(where, gate), async_stager=NoCopy(), process_group=group)
    open_later(gate)
    run.controller.freeze(["embeddings", "blocks.0", "blocks.3"])
    waited = reads.done()
    run.train(range(2, 4))
    ends.result()
    if copies:
        stager.close()
    found = copied(saved, zeros=True)
    dcp.load(found, checkpoint_id=where)
    run.end()
    return {"waited": waited, "differing": differing(found, saved), "tensors": len(saved["model"])}


def sharing(kind: str) -> dict[str, Any]:
    """Rank 1 shares its weights; each rank tries to freeze, registers a callback, and freezes."""
    run, first = Run(kind), dist.get_rank() == 0
    run.train(range(2))
    if not first:
        run.model.share_memory()
    seen: list[Any] = []
    refused = refusal(lambda: run.controller.freeze(["embeddings"]))
    still = list(run.controller.frozen)
    run.train(range(2, 3))
    if not first:
        run.controller.on_layout_change(seen.append)
    run.controller.freeze(["embeddings", "blocks.1"])
    run.train(range(3, 4))
    run.controller.thaw(["blocks.1"])
    run.end()
    return {"refused": refused, "still": still, "seen": seen}


def policy() -> dict[str, Any]:
    """A policy's freeze is left out, with one warning, until there is a callback."""
    own = {"policy": "linear", "linear": {"start_step": 2, "end_step": 9}, "order": "front_to_back", "total_steps": 20, "warmup_steps": 0}
    run = Run("z1", **own, freeze_interval=1, snapshot_interval=1)
    run.model.share_memory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(range(10))
    frozen = list(run.controller.frozen)
    seen: list[Any] = []
    run.controller.on_layout_change(seen.append)
    run.train(range(10, 14))
    texts = [str(w.message) for w in caught if "left out" in str(w.message)]
    after = run.controller.frozen
    run.end()
    return {"warnings": texts, "frozen": frozen, "seen": [list(f) for f in seen], "after": list(after)}


def failing() -> dict[str, Any]:
    """A callback that raises on rank 1 alone."""
    run, first = Run("z1"), dist.get_rank() == 0
    run.train(range(2))

    def fail(frozen: Any) -> None:
        raise OSError("no rollout engine")

    handle = None if first else run.controller.on_layout_change(fail)
    text = refusal(lambda: run.controller.freeze(["embeddings"]))
    frozen = list(run.controller.frozen)
    if handle is not None:
        handle.remove()
    before = run.model.inp.weight.detach().clone()
    run.train(range(2, 4))
    moved = bool((run.model.inp.weight != before).any())
    run.end()
    return {"text": text, "frozen": frozen, "moved": moved}


def main() -> None:
    with ranks.job() as (kinds, folder):
        group = dist.new_group(backend="gloo")  # a save in the background has collectives of its own
        for kind in kinds:
            for copies in (True, False):
                with ranks.case(f"{kind} in flight"):
                    ranks.write(folder, f"{kind}-{copies}", in_flight(folder, kind, group, copies=copies))
        with ranks.case("sharing"):
            ranks.write(folder, "sharing", sharing("z1"))
        with ranks.case("policy"):
            ranks.write(folder, "policy", policy())
        with ranks.case("failing"):
            ranks.write(folder, "failing", failing())


if __name__ == "__main__":
    main()
