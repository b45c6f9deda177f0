"""What must hold before stored rows are used, and the comparison that shows it.

A frozen prefix can be refused from its structure: weights that train, statistics of the batch, hooks of other code. What the structure
does not show is found by running a batch both ways and comparing bits.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_leaves

# Hooks of engines do nothing for a module that does not run; hooks of this package are taken care of by the cache; those with which
# transformers collects hidden states do nothing until it is asked for them, and then the model's output shows it.
_ENGINES = ("deepspeed.", "torch.distributed.", "torch.nn.parallel.")
_HARMLESS = ("smartfrz_ds.", *_ENGINES, "transformers.utils.output_capturing.")
_DEPTH = 4  # of objects in the model's output whose tensors are compared


def refusal(named: Iterable[tuple[str, nn.Module]]) -> str:
    """Return why the results of these modules can't be stored; "" if nothing in their structure forbids it.

    Args:
        named: The modules of the frozen prefix, submodules included, with their names.
    """
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "a global hook on all modules' forward is registered, which would not run for skipped layers"
    for name, module in named:
        for p_name, param in module.named_parameters(recurse=False):
            if param.requires_grad:
                shared = "as another layer shares it; allowed: smartfrz.tied 'freeze'"
                return f"the weight {name}.{p_name} of a frozen layer still trains, {shared}"
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return f"{name} ({type(module).__name__}) computes statistics over the batch, so a row depends on its neighbours"
        if found := next((key for key in vars(module) if "capacity" in key), None):
            return f"{name} has experts of limited capacity ({found}), so a row can depend on its neighbours"
        if hook := _foreign((*module._forward_hooks.values(), *module._forward_pre_hooks.values())):
            return f"a forward hook of other code on {name} ({hook}) would not run for a skipped layer"
        # torch/nn/modules/module.py: set by Module.compile()
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            return f"{name} is compiled, and a compiled module can't be skipped"
    return ""


def hook_refusal(between: Iterable[tuple[str, nn.Module]], model: nn.Module) -> str:
    """Return why hooks of other code on the modules that contain the prefix forbid its use; "" if none does.

    A hook before a forward can change what the frozen layers get; one behind it sees what skipped layers returned. Only hooks behind the
    whole model are harmless.

    Args:
        between: The modules of the model that are in no layer, with their names.
        model: The model.
    """
    for name, module in between:
        behind = () if module is model else module._forward_hooks.values()
        if hook := _foreign((*module._forward_pre_hooks.values(), *behind)):
            return f"a forward hook of other code on {name or 'the model'} ({hook}) acts on the inputs or outputs of frozen layers"
    return ""


def is_engines_hook(hook: Any) -> bool:
    """Whether a hook is an engine's own, such as those that gather and release weights."""
    return _origin(hook).startswith(_ENGINES)


def _foreign(hooks: Iterable[Any]) -> str:
    # torch/nn/modules/module.py: the dictionaries of a module's hooks
    return next((_origin(hook) for hook in hooks if not _is_harmless(hook)), "")


def _is_harmless(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    if getattr(function, "__name__", "") == "make_inputs_require_grads":  # its effect on a frozen layer is undone anyway
        return True
    return _origin(hook).startswith(_HARMLESS)


def _origin(hook: Any) -> str:
    function = getattr(hook, "func", hook)
    where = getattr(function, "__module__", None) or type(function).__module__
    return f"{where}.{getattr(function, '__qualname__', type(function).__qualname__)}"


class RandomState:
    """The state of all random number generators that a forward may use: torch on host and device, Python, numpy.

    Args:
        device: The device on which the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        self._python, self._numpy = random.getstate(), np.random.get_state(legacy=False)

    def is_unchanged(self) -> bool:
        """Whether no random number was drawn since."""
        now = RandomState(self._device)
        if not torch.equal(self._host, now._host) or self._python != now._python:
            return False
        if self._own is not None and now._own is not None and not torch.equal(self._own, now._own):
            return False
        mine, theirs = self._numpy["state"], now._numpy["state"]
        return bool(mine["pos"] == theirs["pos"] and np.array_equal(mine["key"], theirs["key"]))

    def restore(self) -> None:
        """Set all generators back."""
        torch.set_rng_state(self._host)
        if self._own is not None:
            torch.get_device_module(self._device).set_rng_state(self._own, self._device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


@contextmanager
def undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what a forward of `model` changes: random number generators and buffers (running statistics, counters)."""
    before = RandomState(device)
    buffers = [(module, name, value, value.detach().clone()) for module in model.modules() for name, value in _own_buffers(module)]
    try:
        yield
    finally:
        before.restore()
        with torch.no_grad():
            for module, name, value, copy in buffers:
                if value.shape == copy.shape and not same_bits(value, copy):
                    value.copy_(copy)
                module._buffers[name] = value


def _own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in module._buffers.items() if value is not None]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (NaN equals the same NaN)."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if not one.numel():
        return True
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (one, other)]
    return torch.equal(flat[0], flat[1])


def difference(real: Any, skipped: Any) -> str:
    """Return where two outputs of the model differ; "" if they are equal bit for bit.

    Args:
        real: The output of the complete forward.
        skipped: That of the forward without the frozen layers.
    """
    ours, theirs = _parts(real), _parts(skipped)
    if len(ours) != len(theirs):
        return (
            f"the model's output has {len(ours)} parts, and {len(theirs)} without the frozen layers: it collects something from each layer "
            "(hidden states, attentions, router logits, a cache of keys and values); allowed: switch that off, such as use_cache=False"
        )
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        where = f"part {number + 1} of {len(ours)} of the model's output"
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if not same_bits(one, other):
                return f"{where}, of shape {tuple(one.shape)}, reads what a skipped layer returned, or a row depends on its neighbours"
        elif type(one) is not type(other) or (isinstance(one, str | int | float | bool) and one != other):
            return f"{where} differs: {one!r} and {other!r}"
    return ""


def _parts(output: Any) -> list[Any]:
    """Return the leaves of an output; of an object that is not a container, its attributes' leaves (a cache of keys and values)."""
    found: list[Any] = []

    def visit(value: Any, depth: int) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor | str | int | float | bool | type(None)) or depth >= _DEPTH:
                found.append(leaf)
            elif hasattr(leaf, "__dict__"):
                visit([x for _, x in sorted(vars(leaf).items())], depth + 1)
            else:
                found.append(leaf)

    visit(output, 0)
    return found


def named_modules(model: nn.Module, tops: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return `tops` and the modules in them, once each, with their names in `model`."""
    names = {module: name for name, module in model.named_modules()}
    return [(names.get(m, type(m).__name__), m) for m in dict.fromkeys(m for top in tops for m in top.modules())]
