"""Measures one case of `smartfrz bench pipeline`, on every rank. Arguments: CASE FILE SETTINGS, passed by pipeline.py."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from torch import Tensor

import smartfrz_ds
from smartfrz_ds.backends.pipeline.schedule import wrap_instruction
from smartfrz_ds.distributed.devices import synchronize
from smartfrz_ds.planner import LayerCost, simulate

from .launching import Settings, worker_main
from .pipeline import CASES, FRACTIONS, KINDS
from .pipeline_nets import VOCABULARY, WIDTH, gpt, sleepers

WARM_UP = 3  # steps after each change of the layout: the first one also sends shapes and is not timed


class SentBytes:
    """Counts the bytes of activations and gradients that this rank sends to other stages.

    Must be created before the engines; `watch` adds an engine.
    """

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._phase = ""
        send = dist.send

        @functools.wraps(send)
        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._bytes[self._phase] += tensor.nbytes
            return send(tensor, *args, **kwargs)

        dist.send = counting  # deepspeed/comm/torch.py looks it up there at each call

    def watch(self, engine: Any) -> None:
        """Count the bytes that this engine sends."""
        wrap_instruction(engine, schedule.SendActivation, functools.partial(self._in_phase, "activations"))
        wrap_instruction(engine, schedule.SendGrad, functools.partial(self._in_phase, "gradients"))

    def _in_phase(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(engine: Any, **kwargs: Any) -> Any:
            self._phase = phase
            try:
                return call(engine, **kwargs)
            finally:
                self._phase = ""

        return run

    def take(self) -> dict[str, int]:
        """Return the bytes since the last call and reset the counts."""
        taken = {phase: self._bytes[phase] for phase in ("activations", "gradients")}
        self._bytes.clear()
        return taken


class TimedPipeline:
    """One of the engines side by side: a freezing PipelineEngine (fp32, ZeRO 0, no clipping) whose steps are timed."""

    def __init__(self, case: str, settings: Settings, sent: SentBytes) -> None:
        self.sent = sent
        torch.manual_seed(0)
        if CASES[case].net == "gpt":
            specs = gpt(settings["blocks"], settings["width"], settings["length"])
            tokens = torch.randint(0, VOCABULARY, (settings["rows"], settings["length"] + 1))
            batch = (tokens[:, :-1], tokens[:, 1:])
        else:
            specs = sleepers(settings["nap"])
            batch = (torch.ones(1, WIDTH), torch.ones(1))
        self.batches = [batch] * settings["micro_batches"]
        module = PipelineModule(specs, num_stages=CASES[case].stages, loss_fn=_loss, partition_method="uniform")
        config = {
            "train_micro_batch_size_per_gpu": len(batch[0]),
            "gradient_accumulation_steps": settings["micro_batches"],
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
            "pipeline": {"use_reentrant": False},
            "smartfrz": {"policy": "manual", "pipeline": {"rebalance": "off", "min_gain": 1.0}},
        }
        params = list(module.parameters())
        self.engine: Any = smartfrz_ds.initialize(model=module, model_parameters=params, config=config)[0]
        sent.watch(self.engine)
        self.engine.smartfrz._moves.rebalancer.measure()  # by itself it measures only where layers move by themselves
        self.warm_up()

    @property
    def bounds(self) -> list[int]:
        """The current stage bounds."""
        return [int(bound) for bound in self.engine.module.parts]

    def step(self) -> float:
        """Run one step and return the seconds of the slowest rank."""
        dist.barrier()
        began = time.perf_counter()
        self.engine.train_batch(iter(self.batches))
        synchronize(self.engine.device)
        taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)

    def warm_up(self, steps: int = WARM_UP) -> None:
        """Run some steps without using their times."""
        for _ in range(steps):
            self.step()

    def rebalance(self) -> dict[str, Any]:
        """Rebalance by the costs of the last steps. Returns the new bounds, and seconds, bytes and gain of each move."""
        before = len(self.engine.smartfrz.report().events)
        self.engine.smartfrz.rebalance()
        events = self.engine.smartfrz.report().events[before:]
        self.warm_up()
        moved = [{"seconds": e.seconds, "bytes": e.moved_bytes, "gain": e.gain} for e in events if e.kind == "rebalance"]
        return {"bounds": self.bounds, "moves": moved}

    def costs(self) -> list[LayerCost]:
        """Return the cost of each layer, measured since the last change of the layout."""
        costs = self.engine.smartfrz._moves.rebalancer.costs()
        assert costs is not None
        return list(costs)

    def holds(self) -> dict[str, Any]:
        """For each rank: bytes sent in a step, and bytes of optimizer state."""
        self.sent.take()
        self.step()
        mine = self.sent.take() | {"optimizer": self.engine.smartfrz.report().optimizer_bytes}
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        return {key: [one[key] for one in every] for key in mine}


def _loss(output: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), y.flatten()) if output.dim() == 3 else output.sum()


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure a case with all kinds of copies. Collective."""
    sent = SentBytes()
    runs = {kind: TimedPipeline(case, settings, sent) for kind in KINDS}
    start = runs["unfrozen"].bounds
    result: dict[str, Any] = {"case": case, "settings": settings, "ranks": dist.get_world_size(), "start": start}
    result["balanced"] = runs["balanced"].rebalance()["bounds"]
    result["holds"] = {"unfrozen": runs["unfrozen"].holds()}
    names = runs["unfrozen"].engine.smartfrz.layers  # one per entry of the layer list
    first = 1 if CASES[case].net == "gpt" else 0  # the embeddings freeze with the first block
    layers = len(names) - 2 * first
    result["layers"], result["fractions"] = layers, []
    for fraction in FRACTIONS:
        frozen = first + round(fraction * layers)
        for kind in ("pruned", "rebalanced"):
            runs[kind].engine.smartfrz.freeze(names[:frozen])
            runs[kind].warm_up()
        move = runs["rebalanced"].rebalance()
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(settings["rounds"]):
            for shift in range(len(KINDS)):  # the order rotates
                kind = KINDS[(turn + shift) % len(KINDS)]
                seconds[kind].append(runs[kind].step())
        # Measured by the unfrozen engine in the same steps: what could be known before the freeze.
        costs = runs["unfrozen"].costs()
        bounds = {"unfrozen": start, "balanced": result["balanced"], "pruned": start, "rebalanced": move["bounds"]}
        still = {"unfrozen": 0, "balanced": 0, "pruned": frozen, "rebalanced": frozen}
        predicted = {kind: simulate(costs, bounds[kind], settings["micro_batches"], still[kind]).makespan for kind in KINDS}
        result["fractions"].append(
            {
                "fraction": fraction,
                "frozen": frozen,
                "rebalance": move,
                "seconds": seconds,
                "predicted": predicted,
                "costs": [asdict(cost) for cost in costs],
                "holds": {kind: runs[kind].holds() for kind in ("pruned", "rebalanced")},
            }
        )
    return result


def main() -> None:
    """Measure the case of the command line."""
    torch.set_num_threads(1)
    worker_main(measure)


if __name__ == "__main__":
    main()
