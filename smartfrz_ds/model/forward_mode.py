"""Tell reentrant activation checkpointing from a forward that is not trained on (`torch.no_grad()`).

Both run with gradients off. A reentrant region runs inside the forward of an autograd function (torch's and DeepSpeed's
`CheckpointFunction`, Megatron's) whose caller has gradients on; its backward runs the region again. A reference pass of DPO or an
evaluation runs with gradients off from the model's own call on.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from .hooks import ModuleHook


class ForwardMode:
    """Knows with which gradient mode the model was called.

    A model whose submodules are called without itself is not known: there, every autograd function counts as a region.
    """

    def __init__(self, model: nn.Module) -> None:
        self._called: list[bool] = []  # of each call of the model that is under way: may it be trained on
        self._handles = [
            model.register_forward_pre_hook(ModuleHook(self._enter), prepend=True),
            model.register_forward_hook(ModuleHook(self._leave), always_call=True),
        ]

    def region(self) -> Any:
        """Return the autograd function inside whose forward this code runs, the outermost one; None where gradients are on or are off
        for another reason. The object is the `grad_fn` of what that function returns."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or (self._called and not self._called[-1]):
            return None
        return _surrounding_function()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._called.append(torch.is_grad_enabled() or _surrounding_function() is not None)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._called:
            self._called.pop()


def _surrounding_function() -> Any:
    found, frame = None, sys._getframe(1)
    at: FrameType | None = frame
    while at is not None:
        code = at.f_code
        # torch/autograd/function.py: forward(ctx, …); a module's is forward(self, …). Only the former's locals are looked at.
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            context = at.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx):
                found = context
        at = at.f_back
    return found
