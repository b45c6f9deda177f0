"""One of the copies that `smartfrz bench cache` trains in turn: a network, its engine and its controller."""

from __future__ import annotations

import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn import functional as F

import smartfrz_ds
from smartfrz_ds.distributed.devices import synchronize

from .nets import Deal, logits_of, units_of

LR = {"minilm": 2e-5, "mlp": 1e-4}
# Elements. Small enough that gradients are reduced during backward, as in a large model.
BUCKET = 2_000_000


class Copy:
    """A network in an engine. Its steps are timed.

    Args:
        engine: A key of `cells.RANKS`.
        model: The network.
        lr: Learning rate of AdamW.
        section: The "smartfrz" section.
    """

    def __init__(self, engine: str, model: nn.Module, lr: float, section: dict[str, Any]) -> None:
        self.model, self._clock = model, _PrefixClock()
        self._engine: Any = None
        if engine in ("z1", "z2", "z3"):
            config = {
                "train_micro_batch_size_per_gpu": 1,  # the number of rows is the loader's affair
                "steps_per_print": 10**9,
                "zero_optimization": {"stage": int(engine[1:]), "reduce_bucket_size": BUCKET, "overlap_comm": False},
                "zero_force_ds_cpu_optimizer": False,
                "smartfrz": section,
            }
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
            self._engine = smartfrz_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
            self.device, self._forward = self._engine.device, self._engine
            self.controller: Any = self._engine.smartfrz
        else:
            self.device = torch.device(get_accelerator().current_device_name())
            self._forward = _wrapped(engine, model.to(self.device))
            self._optimizer = torch.optim.AdamW(self._forward.parameters(), lr=lr)
            self.controller = smartfrz_ds.attach_torch(self._forward, self._optimizer, section)
        self._forward.train()

    def time_prefix(self, last: nn.Module) -> None:
        """Also time the part of forward and backward up to this module, from the next step on."""
        self._clock.watch(self.model, last)

    def step(self, deal: Deal, seed: int) -> dict[str, float]:
        """Train on a batch.

        Args:
            deal: The batch.
            seed: Of the random numbers of this step: dropout draws the same ones in all copies.

        Returns:
            Seconds of "forward", "backward" and "step", on this rank. With `time_prefix`: "prefix", those of the forward up to the module;
            "prefix_backward", from the gradient of the module's output to the last gradient of a weight, and "rest_backward", from there to
            the end of the engine's backward; both 0 where nothing in front of the module trains.
        """
        inputs = {name: value.to(self.device) for name, value in deal.inputs.items()}
        answers = deal.answers.to(self.device)
        torch.manual_seed(seed)
        dist.barrier()
        times = [self._now()]
        self._clock.border = self._clock.last_gradient = 0.0
        loss = F.cross_entropy(logits_of(self._forward(**inputs)), answers)
        times.append(self._now())
        if self._engine is None:
            loss.backward()
            times.append(self._now())
            self._optimizer.step()
            self._optimizer.zero_grad()
        else:
            self._engine.backward(loss)
            times.append(self._now())
            self._engine.step()
        times.append(self._now())
        clock = self._clock
        taken = {name: times[k + 1] - times[k] for k, name in enumerate(("forward", "backward", "step"))} | {"loss": loss.item()}
        if clock.watches:
            end = clock.last_gradient or times[2]
            taken["prefix"] = clock.prefix
            taken["prefix_backward"] = end - clock.border if clock.border else 0.0
            taken["rest_backward"] = times[2] - end if clock.border else 0.0
        return taken

    def weights(self) -> list[Tensor]:
        """Return all weights: whole under ZeRO-3, whose shards end with memory that is never written, and this rank's part elsewhere.

        Collective.
        """
        params = list(self.model.parameters())
        if all(hasattr(p, "ds_id") for p in params):
            with deepspeed.zero.GatheredParameters(params):
                return [p.detach().clone() for p in params]
        return [self.controller.backend.stored(p).detach() for p in params]

    @property
    def hits(self) -> int:
        """Forwards of this rank that skipped the frozen layers."""
        watch = self.controller._cache
        return 0 if watch is None else int(watch.numbers()[1])

    def close(self) -> None:
        """End the run."""
        self.controller.detach()
        if self._engine is not None:
            self._engine.destroy()

    def _now(self) -> float:
        """Seconds, once all queued work is done."""
        synchronize(self.device)
        return time.perf_counter()


class _PrefixClock:
    """Times at which a step passes the end of the prefix."""

    def __init__(self) -> None:
        self.watches = False
        self.prefix = self.border = self.last_gradient = self._began = 0.0

    def watch(self, model: nn.Module, last: nn.Module) -> None:
        self.watches = True
        model.register_forward_pre_hook(self._begin)
        last.register_forward_hook(self._end)
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._gradient)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.prefix = time.perf_counter() - self._began
        leaving = output[0] if isinstance(output, tuple) else output
        if leaving.grad_fn is not None:
            leaving.register_hook(self._pass_border)

    def _pass_border(self, gradient: Tensor) -> None:
        self.border = time.perf_counter()

    def _gradient(self, param: Tensor) -> None:
        self.last_gradient = time.perf_counter()


def _wrapped(engine: str, model: nn.Module) -> nn.Module:
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for unit in units_of(model):
            fully_shard(unit)
        fully_shard(model)
        return model
    assert engine == "one", engine
    return model
