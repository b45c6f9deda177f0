"""The toy on a DeepSpeed engine, or in a pipeline of two stages."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from smartfrz_ds.integrations.deepspeed import attach

from .case import Case
from .plain import Net, cross_entropy, data, entries, flat, loss_of


class EngineToy:
    """One engine with the toy. A new one has the toy's first weights.

    Args:
        case: The kind of engine.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        config = case.config()
        if case.kind == "pipeline":
            from deepspeed.pipe import PipelineModule

            model: Any = PipelineModule(entries(), loss_fn=cross_entropy, num_stages=2, partition_method="uniform")
        else:
            model = Net()
        engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
        self._engine: Any = attach(engine)

    def train(self, step: int) -> None:
        """Do one step."""
        engine, half = self._engine, self._case.half
        if self._case.kind == "pipeline":
            parts = [data(step, part) for part in range(2)]
            engine.train_batch(iter([(x.bfloat16() if half else x, y) for x, y in parts]))
            return
        engine.backward(loss_of(engine, step, dist.get_rank(), half=half))
        engine.step()

    def change(self, action: str, layers: Sequence[str]) -> None:
        """Freeze or thaw layers of `Net`."""
        names = [f"layers.{0 if x == 'embeddings' else int(x.split('.')[1]) + 1}" for x in layers]  # entries of the pipeline's list
        getattr(self._engine.smartfrz, action)(names if self._case.kind == "pipeline" else list(layers))

    def weights(self) -> Tensor:
        """Return all weights in the order of `Net`, (n,) fp32. Collective."""
        params = list(self._engine.module.parameters())
        if self._case.kind == "pipeline":
            told: list[Any] = [None] * dist.get_world_size()
            named = {n: p.detach() for n, p in self._engine.module.named_parameters()}
            dist.all_gather_object(told, named)
            both = {n: t for part in told for n, t in part.items()}
            return flat(both[n] for n in sorted(both, key=lambda n: int(n.split(".")[0])))
        gathered: Any = deepspeed.zero.GatheredParameters(params) if self._case.stage == 3 else contextlib.nullcontext()
        with gathered:
            return flat(params)

    def optimizer_bytes(self) -> int:
        """Return the bytes of optimizer state on this rank."""
        return int(self._engine.smartfrz.report().optimizer_bytes)

    def save(self, folder: Path) -> None:
        """Save a checkpoint. Collective."""
        self._engine.save_checkpoint(str(folder), tag="toy")

    def load(self, folder: Path) -> None:
        """Load it. Collective."""
        self._engine.load_checkpoint(str(folder), tag="toy")

    def close(self) -> None:
        """Let the engine go."""
        self._engine.destroy()


def prepare() -> None:
    """Prepare DeepSpeed in the toy's process: quiet, and without the op for shared memory, whose build takes longer than the check."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False  # read by comm/torch.py: build_shm_op
    deepspeed.init_distributed(dist_backend="gloo")


def versions() -> Iterable[str]:
    """Return the versions that this process has imported."""
    return [f"deepspeed {deepspeed.__version__}"]
