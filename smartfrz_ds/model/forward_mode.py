"""Distinguish reentrant activation checkpointing from a forward that is not trained on (`torch.no_grad()`).

Both run with gradients off. A reentrant region runs inside the forward of an autograd function (`CheckpointFunction`
of torch, DeepSpeed and Megatron) whose caller has gradients on; its backward runs the region again. A reference pass
of DPO or an evaluation runs with gradients off from the call of the model itself.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from .hooks import ModuleHook, PluginTime


class ForwardMode:
    """Records the gradient mode in which the model was called.

    If submodules are called without the model itself, every autograd function counts as a region.

    Args:
        model: The model to watch.
        time: Counts the seconds of the hooks, if given.
    """

    def __init__(self, model: nn.Module, time: PluginTime | None = None) -> None:
        self._called: list[bool] = []  # for each active call of the model: whether it may be trained on
        self._handles = [
            model.register_forward_pre_hook(ModuleHook(self._enter, time), prepend=True),
            model.register_forward_hook(ModuleHook(self._leave, time), always_call=True),
        ]

    def region(self) -> Any:
        """Return the outermost autograd function inside whose forward this code runs.

        Returns:
            The object that is the `grad_fn` of the function's result; None if gradients are on, or off for another
            reason.
        """
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or (self._called and not self._called[-1]):
            return None
        return _surrounding_function()

    def remove(self) -> None:
        """Remove the hooks."""
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
        # torch/autograd/function.py: forward(ctx, …); a module has forward(self, …). Only locals of the former are
        # read.
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            context = at.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx):
                found = context
        at = at.f_back
    return found
