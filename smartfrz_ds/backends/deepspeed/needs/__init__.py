"""What the backends need of DeepSpeed beyond its documented interface, by engine and option; looked for at the start, on every rank.

A private name that a release lacks would otherwise show at the first freeze, hours into a run, and on one rank alone it would leave the
others waiting. `check_needs` refuses such an engine before the first step, by the name and the file.

To touch another name of DeepSpeed in a backend, add it to the table of its wrapper: engine.py (every engine, and its checkpoints), flat.py
(ZeRO-1/2, BF16_Optimizer and the wrappers of stage 0), zero3.py, or backends/pipeline/needs.py. `has` takes attributes, `takes` functions
with the arguments that we pass, `overrides` methods that our mixins replace, and `late` attributes that are set after the start. For
releases that differ:
  - the same thing under another name: "new_name|old_name";
  - a name that older releases lack, where the backend does without it: `versions=">=0.19.7"`, the releases that must have it;
  - what only the branch for older releases needs: `versions="<0.19.7"`.
tests/unit/test_needs.py compares the tables with the source of the backends: a touch that is in none of them fails it.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from smartfrz_ds.backends.probing import CannotTell, Need, ask, missing, refusal

from .engine import ENGINE, UNIVERSAL
from .flat import BF16, FP16, OFFLOAD12, UNFUSED, ZERO12
from .zero3 import OFFLOAD3, OFFLOAD_PARAM, RESIDENT_PARAM, ZERO3

#: By kind: the words for messages, and the needs.
KINDS: dict[str, tuple[str, list[Need]]] = {
    "engine": ("freezing", ENGINE),
    "universal": ("checkpoint.load_universal", UNIVERSAL),
    "zero12": ("ZeRO-1/2", ZERO12),
    "offload12": ("offload_optimizer with ZeRO-1/2", OFFLOAD12),
    "bf16": ("ZeRO-1 with BF16_Optimizer", BF16),
    "fp16": ("ZeRO-0 with FP16_Optimizer", FP16),
    "unfused": ("ZeRO-0 with FP16_UnfusedOptimizer", UNFUSED),
    "zero3": ("ZeRO-3", ZERO3),
    "resident3": ("ZeRO-3 without offload_param", RESIDENT_PARAM),
    "offload3": ("offload_optimizer with ZeRO-3", OFFLOAD3),
    "offload_param": ("offload_param with ZeRO-3", OFFLOAD_PARAM),
}


def kinds_of(engine: DeepSpeedEngine) -> list[str]:
    """Return the keys of `KINDS` that concern this engine.

    Raises:
        CannotTell: An attribute that shows an option is missing.
    """
    optimizer, kinds = engine.optimizer, ["engine"]
    if ask(engine, "load_universal_checkpoint()"):
        kinds.append("universal")
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        kinds += ["zero3", "offload_param" if ask(optimizer, "offload_param") else "resident3"]
        kinds += ["offload3"] if ask(optimizer, "offload_optimizer") else []
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        kinds += ["zero12", "offload12"] if ask(optimizer, "cpu_offload") else ["zero12"]
    elif isinstance(optimizer, BF16_Optimizer):
        kinds.append("bf16")
    elif isinstance(optimizer, FP16_Optimizer):
        kinds.append("fp16")
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        kinds.append("unfused")
    return kinds


class EngineRoots:
    """The objects of one engine that the tables name. A name with a dot is a class or a module of DeepSpeed's."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine

    def __call__(self, owner: str) -> Any:
        """Return the object.

        Raises:
            CannotTell, ImportError, AttributeError: There is none.
        """
        if owner == "engine":
            return self._engine
        if owner == "param":
            return self._a_param()
        if "." in owner and owner.startswith("deepspeed"):
            return named(owner)
        return ask(self._engine, owner)

    def _a_param(self) -> Any:
        """Return a trainable parameter of the model's, which has the attributes that DeepSpeed gives those of its optimizer."""
        found = next((p for p in self._engine.module.parameters() if p.requires_grad), None)
        if found is None:
            raise CannotTell("the model has no trainable parameter")
        return found


def named(path: str) -> Any:
    """Import a module, or a class in one, by its full name."""
    from importlib import import_module

    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name) if name[:1].isupper() else import_module(path)


def check_needs(engine: DeepSpeedEngine, more: dict[str, tuple[str, list[Need]]] | None = None) -> None:
    """Check that this DeepSpeed has everything that freezing this engine touches. Not collective.

    Args:
        engine: The engine.
        more: Other kinds that concern this engine, as in `KINDS` (those of pipelines).

    Raises:
        ValueError: Names what is missing, its file, and the option that needs it.
    """
    tables = [KINDS[kind] for kind in kinds_of(engine)] + list((more or {}).values())
    root_of = EngineRoots(engine)
    lines = []
    for words, needs in tables:
        lines += [f"{lack}, which {words} needs" for lack in missing(needs, root_of, deepspeed.__version__)]
    if lines:
        raise ValueError(refusal(f"DeepSpeed {deepspeed.__version__}", lines, "DeepSpeed"))
