"""Keeps frozen parameters frozen when other code sets `requires_grad`.

PEFT's `set_adapter` and `disable_adapter`, `model.requires_grad_(True)` and unfreezing schedules switch the flag of frozen parameters back
on. No weight would move, but gradients would be computed and kept. A hook on each frozen parameter runs only if it gets a gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.model.hooks import ModuleHook


@dataclass(frozen=True)
class Intrusion:
    """The cost of switching frozen parameters on, in one step.

    Attributes:
        layers: Names of the layers that were switched on.
        bytes: Bytes of gradients that were computed on this rank and dropped; 0 if it was noticed before that.
    """

    layers: tuple[str, ...]
    bytes: int

    def text(self, step: int) -> str:
        """Return the warning."""
        cost = (
            f"their gradients were computed in step {step} ({self.bytes} bytes on this rank) and dropped, and that step's FLOPs are not "
            "counted as saved"
            if self.bytes
            else "it was noticed before a gradient was computed"
        )
        names = ", ".join(self.layers[:5]) + (f", … ({len(self.layers)} in all)" if len(self.layers) > 5 else "")
        return (
            f"other code has set requires_grad=True on parameters of the frozen layers {names} (an adapter switch of PEFT, "
            f"model.requires_grad_(True) or an unfreezing schedule do that); {cost}. No weight has moved. The layers stay frozen: from "
            "now on the flags are put back before each forward. To train a layer again call thaw([…]) of the controller. Said once"
        )


class KeptFrozen:
    """Watches the frozen parameters of one engine.

    The flags themselves are read only when a freeze, a thaw or a checkpoint needs them, and before each forward once other code is known to
    switch them (FSDP1, whose parameters run no hooks: from the beginning).

    Args:
        model: The model whose forward begins a step.
        backend: The engine's backend.
    """

    def __init__(self, model: nn.Module, backend: Backend) -> None:
        self._backend = backend
        self._layer_of: Mapping[Parameter, str] = {}
        self._handles: dict[Parameter, RemovableHandle] = {}
        self._came: dict[Parameter, int] = {}  # bytes of gradients of each parameter in this step
        self._meddled = not backend.runs_grad_hooks
        self._said = False
        self._model = model
        self._forward: RemovableHandle | None = None

    def follow(self, frozen: Collection[Parameter], layer_of: Mapping[Parameter, str]) -> None:
        """Watch exactly these parameters from now on.

        Args:
            frozen: The frozen parameters. Some may be watched already.
            layer_of: Name of each parameter's layer.
        """
        self._layer_of = layer_of
        for param in [p for p in self._handles if p not in frozen]:
            self._handles.pop(param).remove()
        for param in frozen:
            if param not in self._handles:
                flag = param.requires_grad
                param.requires_grad_(True)  # torch/_tensor.py registers no hook without it, but keeps one
                self._handles[param] = param.register_post_accumulate_grad_hook(self._got_gradient)
                param.requires_grad_(flag)
        self._watch_forward()

    def _watch_forward(self) -> None:
        """Have a hook before each forward if there is anything to do in it."""
        if not (self._meddled and self._handles):
            if self._forward is not None:
                self._forward.remove()
            self._forward = None
        elif self._forward is None:
            hook = ModuleHook(self._before_forward, self._backend.time)
            self._forward = self._model.register_forward_pre_hook(hook, prepend=True)

    def restore_flags(self) -> None:
        """Switch off all frozen parameters that other code has switched on. Reads all flags."""
        for param in self._handles:
            if self._backend.takes_part(param):
                self._note(param)

    def after_step(self) -> Intrusion | None:
        """Return the cost of other code since the last call; None if it did nothing."""
        if not self._came:
            return None
        self._meddled = True
        self._watch_forward()
        self.restore_flags()  # including those that this step did not use
        layers = dict.fromkeys(name for p, name in self._layer_of.items() if p in self._came)
        intrusion = Intrusion(tuple(layers), sum(self._came.values()))
        self._came.clear()
        return intrusion

    def first_time(self) -> bool:
        """Return True at the first call."""
        said, self._said = self._said, True
        return not said

    def remove(self) -> None:
        """Remove all hooks."""
        self.follow((), {})

    def _got_gradient(self, param: Tensor) -> None:
        self._note(param)  # type: ignore[arg-type]

    def _note(self, param: Parameter) -> None:
        spent = param.grad.nbytes if param.grad is not None else 0
        self._came[param] = self._came.get(param, 0) + spent
        self._backend.take_out(param)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.restore_flags()
