"""What `smartfrz bench overhead` runs on each rank: training with nothing frozen, while calls are counted and the meter is read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import smartfrz_ds
from smartfrz_ds.bench.launching import Settings, worker_main

from .counting import Counts, counting

WIDTH, LINEARS = 4, 8  # of a block: width, and number of linear maps with two parameters each
# Steps between snapshots, status lines and freezing stages. No layer freezes by itself: that begins far behind the end of these runs.
SPACING = {"snapshot_interval": 4, "status_interval": 7, "freeze_interval": 10}
# Of each kind, the step whose calls are counted: the first three steps are recorded for the check after a freeze, the fifth is plain.
STEPS = {
    "plain step": 5,
    "status line": 7,
    "snapshot": 8,
    "freezing stage": 10,
    "first step after a freeze": 13,
    "plain step, half frozen": 15,
}
FREEZE_AFTER = 12
WARM_UP = 12  # steps before times count


class Block(nn.Module):
    """A residual block of linear maps, with two parameters each."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LINEARS))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (batch, WIDTH), to the same shape."""
        for one in self.maps:
            x = torch.tanh(x + one(x))  # stays finite, however many blocks there are
        return x


class Net(nn.Module):
    """A net with exactly `params` small parameters (>= 18), most of them in blocks.

    Args:
        params: Number of parameters, not of their elements.
    """

    def __init__(self, params: int) -> None:
        super().__init__()
        blocks, rest = divmod(params - 2, 2 * LINEARS)
        self.stem = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(rest + 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (batch, WIDTH), to the same shape."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass
class Run:
    """A run whose overhead is measured. step: trains one step. controller: the run's."""

    step: Callable[[], object]
    controller: Any


def start(engine: str, params: int, folder: str) -> Run:
    """Start a run. Collective.

    Args:
        engine: "torch" (attach_torch, one process), "fsdp2", "z2", "z3" or "pipeline" (as many stages as ranks).
        params: Number of parameters of the net.
        folder: Where the log goes.
    """
    torch.manual_seed(0)
    section = {"policy": "linear", "total_steps": 1_000_000, "warmup_steps": 0, "log_path": f"{folder}/{engine}", **SPACING}
    x = torch.ones(2, WIDTH)
    if engine in ("torch", "fsdp2"):
        net = Net(params)
        if engine == "fsdp2":
            _shard(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, foreach=True)
        controller = smartfrz_ds.attach_torch(net, optimizer, section)

        def step() -> None:
            net(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return Run(step, controller)
    config = {
        "train_micro_batch_size_per_gpu": len(x),
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "smartfrz": section,
    }
    if engine == "pipeline":
        return _pipeline(params, config | {"gradient_accumulation_steps": 2}, x)
    net = Net(params)
    config["zero_optimization"] = {"stage": int(engine[1:]), "reduce_bucket_size": 10**6}
    ds: Any = smartfrz_ds.initialize(model=net, model_parameters=list(net.parameters()), config=config)[0]

    def ds_step() -> None:
        ds.backward(ds(x).sum())
        ds.step()

    return Run(ds_step, ds.smartfrz)


def _shard(net: Net) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _pipeline(params: int, config: Settings, x: Tensor) -> Run:
    from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule

    blocks = max(dist.get_world_size(), params // (2 * LINEARS))
    module = PipelineModule(
        [LayerSpec(Block) for _ in range(blocks)],
        num_stages=dist.get_world_size(),
        loss_fn=lambda output, target: output.sum(),
        partition_method="uniform",
    )
    engine: Any = smartfrz_ds.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]
    batches = [(x, x)] * config["gradient_accumulation_steps"]
    return Run(lambda: engine.train_batch(iter(batches)), engine.smartfrz)


def counts_of(run: Run) -> dict[str, Counts]:
    """Train `run`, freshly started, and count in the steps of `STEPS`, and in a freeze of the front half. Collective."""
    kinds, seen = {step: kind for kind, step in STEPS.items()}, {}
    for step in range(1, max(kinds) + 1):
        if step in kinds:
            with counting() as seen[kinds[step]]:
                run.step()
        else:
            run.step()
        if step == FREEZE_AFTER:
            layers = run.controller.layers
            with counting() as seen["freeze"]:
                run.controller.freeze(layers[: len(layers) // 2])
    return seen


def seconds_of(run: Run, steps: int) -> dict[str, list[float]]:
    """Train `run`, freshly started, for `steps` steps, and return the plugin's seconds in each of them, by kind. Collective."""
    kinds = dict(zip(("snapshot", "status line", "freezing stage"), SPACING.values(), strict=True))
    seen: dict[str, list[float]] = {}
    time = run.controller._run.time
    for step in range(1, steps + 1):
        before = time.seconds
        run.step()
        due = [kind for kind, spacing in kinds.items() if step % spacing == 0]
        if step > WARM_UP and len(due) < 2:
            seen.setdefault(due[0] if due else "plain step", []).append(time.seconds - before)
    return seen


def measure(case: str, settings: Settings) -> dict[str, Any]:
    """Measure one case: "torch-700" (seconds and counts of one process) or "fsdp2-counts" (counts only). Collective."""
    engine, what = case.split("-")
    params = settings["few"] if what == "counts" else int(what)
    result: dict[str, Any] = {"case": case, "settings": settings, "engine": engine, "params": params, "ranks": dist.get_world_size()}
    with tempfile.TemporaryDirectory() as folder:
        if what != "counts":
            result["seconds"] = seconds_of(start(engine, params, f"{folder}/timed"), settings["steps"])
        seen = counts_of(start(engine, params, f"{folder}/counted"))
    return result | {"counts": {kind: counts.numbers() for kind, counts in seen.items()}}


def main() -> None:
    """Measure the case of the command line."""
    torch.set_num_threads(1)
    worker_main(measure)


if __name__ == "__main__":
    main()
