"""Times steps of a real PipelineEngine whose layers sleep, so that each layer's cost is known. Launched by test_planned.py."""

from __future__ import annotations

import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from workers import ranks

WIDTH = 4


class Nap(torch.autograd.Function):
    """x · weight, which takes the times that it is told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: tuple[float, float, float]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seconds = seconds
        time.sleep(seconds[0])
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        time.sleep(ctx.seconds[1] * ctx.needs_input_grad[0] + ctx.seconds[2])
        return grad * weight if ctx.needs_input_grad[0] else None, (grad * x).sum(0), None


class Sleeper(nn.Module):
    """seconds: of forward, of the gradient of the input, of the gradient of the weight."""

    def __init__(self, seconds: tuple[float, float, float]) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return Nap.apply(x, self.weight, self.seconds)


class CutModule(PipelineModule):
    """A PipelineModule that is cut where it is told."""

    def __init__(self, layers: list[LayerSpec], parts: list[int]) -> None:
        self._wanted = parts
        super().__init__(layers=layers, num_stages=len(parts) - 1, loss_fn=lambda out, _: out.sum())

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self._wanted
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def seconds_of_steps(costs: list[list[float]], parts: list[int], micro_batches: int, steps: int) -> list[float]:
    """Wall-clock seconds of each step, barrier to barrier; the first one, which sends shapes too, is left out."""
    module = CutModule([LayerSpec(Sleeper, tuple(c)) for c in costs], parts)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    took = []
    for _ in range(steps + 1):
        batches = iter([(torch.ones(1, WIDTH), torch.ones(1))] * micro_batches)
        dist.barrier()
        began = time.perf_counter()
        engine.train_batch(batches)
        dist.barrier()
        took.append(time.perf_counter() - began)
    return took[1:]


if __name__ == "__main__":
    with ranks.job() as (cases, folder):
        for name, case in cases.items():
            with ranks.case(name):
                ranks.write(folder, name, seconds_of_steps(**case))
