"""Selects the backend of a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.optim import Optimizer

from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.deepspeed.compat import check_engine
from smartfrz_ds.backends.deepspeed.half import Bf16Backend, Fp16Backend
from smartfrz_ds.backends.deepspeed.needs import check_needs
from smartfrz_ds.backends.deepspeed.zero0 import Zero0Backend
from smartfrz_ds.backends.deepspeed.zero3 import FrozenStorage, Zero3Backend
from smartfrz_ds.backends.deepspeed.zero12 import Zero12Backend
from smartfrz_ds.backends.pipeline.needs import KIND
from smartfrz_ds.backends.pipeline.stage import of_a_stage
from smartfrz_ds.errors import FreezeError

from .base import Backend, Released, Sampler, SampleRequest


def check_start(engine: DeepSpeedEngine) -> None:
    """Check that freezing works with an engine's features, and that this DeepSpeed has everything that it touches. Changes nothing.

    Raises:
        ValueError: An unsupported feature, or something private that this DeepSpeed lacks, by name.
    """
    check_engine(engine)
    check_needs(engine, KIND if isinstance(engine, PipelineEngine) else None)


def make_backend(engine: DeepSpeedEngine, *, zero3_frozen: FrozenStorage = "sharded") -> DeepSpeedBackend:
    """Create the backend for an engine, after `check_start`.

    Args:
        engine: The engine.
        zero3_frozen: Where ZeRO-3 keeps the weights of frozen layers, see Zero3Backend.

    Raises:
        ValueError: An optimizer wrapper that is unknown.
    """
    backends: list[tuple[type, Callable[[DeepSpeedEngine], DeepSpeedBackend]]] = [
        (DeepSpeedZeroOptimizer_Stage3, partial(Zero3Backend, frozen=zero3_frozen)),
        (DeepSpeedZeroOptimizer, Zero12Backend),
        (BF16_Optimizer, Bf16Backend),
        (FP16_Optimizer, Fp16Backend),
        (FP16_UnfusedOptimizer, Zero0Backend),
        (Optimizer, Zero0Backend),
    ]
    for optimizer, backend in backends:
        if isinstance(engine.optimizer, optimizer) and not _variant(engine.optimizer, optimizer):
            made = of_a_stage(backend)(engine) if isinstance(engine, PipelineEngine) and isinstance(backend, type) else backend(engine)
            if why := made.uncuttable_later():
                made.warnings.append(why)
            return made
    raise ValueError(
        f"smartfrz_ds does not know the optimizer wrapper {type(engine.optimizer).__name__} of DeepSpeed; allowed: "
        f"{', '.join(known.__name__ for known, _ in backends)}. Set smartfrz.enabled to false to train without it."
    )


def _variant(wrapper: Any, known: type) -> bool:
    """Whether this is a DeepSpeed subclass of one of its wrappers (SuperOffload, ZenFlow), which steps differently."""
    own = type(wrapper)
    return own is not known and known is not Optimizer and own.__module__.split(".")[0] == "deepspeed"


__all__ = ["Backend", "FreezeError", "Released", "SampleRequest", "Sampler", "make_backend"]
