"""A module's call, with something else in its place: around its `__call__`, so that no hook of an engine runs for a skipped module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .proof import is_engines_hook, named_modules, refusal


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


class Course:
    """The modules with hooks of an engine that a forward enters and leaves, in order, those in skipped layers left out.

    If a forward raises on one rank, the others continue to wait for its part of their weights. With the course of an earlier forward, the
    rank runs the engine's hooks of the modules that are left, without the modules.

    Attributes:
        events: A module, and whether it was entered or left.
        paused: Whether a layer runs that will be skipped.
    """

    def __init__(self) -> None:
        self.events: list[tuple[nn.Module, bool]] = []
        self.paused = False

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Record the forward of `model` that is the block, without `model` itself."""
        inside = (m for m in model.modules() if m is not model)
        hooked = [m for m in inside if any(is_engines_hook(x) for x in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))]
        handles = [m.register_forward_pre_hook(self._enter, prepend=True) for m in hooked]
        handles += [m.register_forward_hook(self._leave, prepend=True) for m in hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self.paused:
            self.events.append((module, True))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.paused:
            self.events.append((module, False))

    def finish_like(self, known: Course, model: nn.Module) -> None:
        """Run the engine's hooks that a forward of `model` on this course, which has raised, did not come to."""
        for module, enters in (*known.events[len(self.events) :], (model, False)):
            hooks = module._forward_pre_hooks if enters else module._forward_hooks
            with_kwargs = module._forward_pre_hooks_with_kwargs if enters else module._forward_hooks_with_kwargs
            for key, hook in list(hooks.items()):
                if is_engines_hook(hook):
                    hook(module, (), *([{}] if key in with_kwargs else []), *([] if enters else [()]))


def structure_refusal(model: nn.Module, tops: Sequence[nn.Module]) -> str:
    """Return why the structure of a model forbids the prefix cache with these frozen modules in front; "" if nothing in it does."""
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        return "torch.nn.DataParallel copies the modules in each forward"
    if reason := refusal(named_modules(model, tops)):
        return reason
    taken = next((type(m).__name__ for m in (model, *tops) if is_wrapped(m)), "")
    return f"other code has replaced the call of a {taken}" if taken else ""
