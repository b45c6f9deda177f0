"""Changes that fail at every point on the stages of real pipelines: each time all ranks must be back where they were. Launched by
test_undo_pipeline.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from reference.injected import Injector
from reference.picture import differences, picture
from torch import Tensor
from workers import ranks, worker_pipeline, worker_tied

from smartfrz_ds.backends import memory
from smartfrz_ds.backends.pipeline import parcels
from smartfrz_ds.errors import ChangeUndone, NotEnoughMemory

LAST = "the last vote"
DERIVED = ("._hp_grad", ".grad_accum")


class StageInjector(Injector):
    """Its points can also be counted: stages pass different ones."""

    counts = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it, the change fails at its last point, the same on all ranks."""
        self.arm(None)
        self.counts = True
        try:
            yield
        finally:
            self.counts = False

    def _is_here(self, name: str) -> bool:
        return super()._is_here(name) or (self.counts and name == LAST)


class Trial:
    """One pipeline, in which changes are tried with an error at each point of each stage, and then carried out one step later.

    tries: whether they are tried at all.
    """

    def __init__(self, case: Mapping[str, Any], injector: StageInjector, *, tries: bool) -> None:
        self.case, self.injector, self.tries = case, injector, tries
        self._worker: Any = worker_tied if "tied" in case else worker_pipeline
        self.engine = self._worker.engine_for(dict(case))
        self.controller = self.engine.smartfrz
        self.points: dict[str, list[str]] = {}
        self.wrong: list[str] = []

    def train(self) -> list[Tensor]:
        """Return the weights after each step."""
        history, plan = [], self.case["plan"]
        for number in range(self.case["steps"]):
            if number + 1 in self.case["tried"] and self.tries:
                kind, what = plan[str(number + 1)]
                self.attempt(f"{kind} {what}", partial(getattr(self.controller, kind), what))
            if action := plan.get(str(number)):
                getattr(self.controller, action[0])(action[1])
            self.engine.train_batch(iter(self.batches(number)))
            history.append(self._worker.weights(self.engine))
        return history

    def batches(self, step: int) -> list[Any]:
        dtype = () if "tied" in self.case else (self.case.get("dtype", "fp32"),)
        return list(self._worker.batches(step, self.case["micro"], self.engine.grid.get_data_parallel_id(), *dtype))

    def attempt(self, name: str, action: Callable[[], Any]) -> None:
        """Let the change fail at each of its points, on one rank after the other; nothing remains of it."""
        rank = dist.get_rank()
        with self.injector.counting():
            self.fail(f"{name}, counted", action, struck=0)
        self.points[name] = list(self.injector.passed)
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, len(self.injector.passed))
        for struck, count in enumerate(counts):
            for number in range(0, count, self.case.get("stride", 1)):
                self.injector.arm(number if rank == struck else None)
                self.fail(f"{name}, point {number} of rank {struck}", action, struck=struck)
        self.injector.arm(None)
        if name.startswith("rebalance"):
            for struck in range(len(counts)):
                with cut_short() if rank == struck else nullcontext():
                    self.fail(
                        f"{name}, a copy that fails within the exchange on rank {struck}", action, struck=struck, error="ValueError: zip"
                    )

            self.crowd(name, action)

    def crowd(self, name: str, action: Callable[[], Any]) -> None:
        """Let the change be refused because one host has no room."""
        before, own = self.picture(), memory.free_host_memory
        memory.free_host_memory = lambda: 1000 if dist.get_rank() else None
        try:
            action()
        except NotEnoughMemory as error:
            said = str(error)
        else:
            raise AssertionError(f"{name}: not refused")
        finally:
            memory.free_host_memory = own
        self.wrong += [f"{name}, without room: {text}" for text in differences(before, self.picture())]
        if not said.startswith("not enough memory to move layers to the bounds [0, "):
            self.wrong.append(said)

    def fail(self, where: str, action: Callable[[], Any], *, struck: int, error: str = "Injected: ") -> None:
        before, events = self.picture(), len(self.controller.report().events)
        try:
            action()
        except ChangeUndone as undone:
            said = str(undone)
        else:
            raise AssertionError(f"{where}: nothing failed")
        if self.injector.passed:
            where = f"{where} ({self.injector.passed[-1]})"
        self.wrong += [f"{where}: {text}" for text in differences(before, self.picture())]
        new = self.controller.report().events[events:]
        if [e.kind for e in new] != ["undone"] or f"undone on every rank: rank {struck}: {error}" not in said:
            self.wrong.append(f"{where}: {said!r}, events {[(e.kind, e.message) for e in new]}")

    def picture(self) -> dict[str, str]:
        engine = self.engine
        seen = picture(
            model=engine.module,
            base=engine.basic_optimizer,
            backend=self.controller.backend,
            state=self.controller._run.state,
            wiring=wiring(engine),
        )
        # Not part of the layout: what the clock has seen; what the wrapper derives from weights and masters and makes anew in each change
        # (the steps that follow show that it is right); what is made when it is first needed, and stays.
        derived = ("backend.clock", "backend.wrapper", "backend.placeholders", "backend.own_steps._hooked", "base._optimizer_step_")
        return {p: there for p, there in seen.items() if not p.startswith(derived) and not p.endswith(DERIVED) and "._hp_mapping" not in p}


@contextmanager
def cut_short() -> Iterator[None]:
    """Within it, a tensor is missing when a stage packs, or unpacks, what moves."""
    own = parcels._copy
    parcels._copy = lambda sources, targets, fail_later: own(sources[:-1], targets, fail_later)
    try:
        yield
    finally:
        parcels._copy = own


def wiring(engine: Any) -> dict[str, str]:
    """What a stage's engine and module know of their entries."""
    pipe = engine.module
    known = {
        "parts": pipe.parts,
        "held": [pipe._local_start, pipe._local_stop],
        "functions": [(id(f), type(f).__name__) for f in pipe.forward_funcs],
        "modules": list(pipe._modules),
        "map": pipe.fwd_map,
        "names": [name for name in engine.param_names.values() if not name.startswith("smartfrz_")],
        "shapes told": not engine.first_output_send,
        "replicated": [(name, p.ds_pipe_replicated) for name, p in pipe.named_parameters()],
    }
    return {key: repr(value) for key, value in known.items()}


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """Train with and without errors."""
    ends: list[list[Tensor]] = []
    trials: list[Trial] = []
    for tries in (True, False):
        injector = StageInjector(lines=case.get("lines", False) and tries)
        trial = Trial(case, injector, tries=tries)
        with warnings.catch_warnings(), injector.installed():
            warnings.simplefilter("error", RuntimeWarning)  # of this package
            ends.append(trial.train())
        trials.append(trial)
        trial.engine.destroy()
    return {
        "points": trials[0].points,
        "wrong": trials[0].wrong[:40],
        "different": [k for k, (one, other) in enumerate(zip(*ends, strict=True)) if not torch.equal(one, other)],
        "moved": not torch.equal(ends[0][0], ends[0][-1]),
    }


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for case in job:
            with ranks.case(case["name"]):
                ranks.write(folder, case["name"], run(case))


if __name__ == "__main__":
    main()
