"""A module's call, with something else in its place: around its `__call__`, so that no hook of an engine runs for a skipped module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .proof import is_engines_hook


class Around:
    """Replaces `_call_impl` of one module, which `__call__` calls (torch/nn/modules/module.py).

    In a copied or pickled model it only calls the module.

    Args:
        module: The module.
        function: Called with the module and its arguments; None: the module's own call.
    """

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any] | None) -> None:
        self._module, self._function = module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or the function in its place."""
        if self._function is None or torch.compiler.is_compiling():
            return call_of(self._module, args, kwargs)
        return self._function(self._module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Around, (self._module, None)

    def install(self) -> None:
        """Take the place of the module's own call."""
        vars(self._module)["_call_impl"] = self

    def remove(self) -> None:
        """Give the module its own call back."""
        self._function = None
        if vars(self._module).get("_call_impl") is self:
            del vars(self._module)["_call_impl"]


def call_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a module with its hooks, as if nothing were around it."""
    return type(module)._call_impl(module, *args, **kwargs)


def call_with_engine(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a module with those of its own hooks alone that gather and release weights for an engine; of its submodules all hooks run."""
    # torch/nn/modules/module.py: the dictionaries of a module's hooks
    before, behind = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks = OrderedDict((key, hook) for key, hook in before.items() if is_engines_hook(hook))
    module._forward_hooks = OrderedDict((key, hook) for key, hook in behind.items() if is_engines_hook(hook))
    try:
        return call_of(module, args, kwargs)
    finally:
        module._forward_pre_hooks, module._forward_hooks = before, behind


def is_wrapped(module: nn.Module) -> bool:
    """Whether something else has replaced this module's call."""
    return "_call_impl" in vars(module)
