"""The flat buffers of DeepSpeed's wrappers, and their links to the model's parameters.

Touched in DeepSpeed 0.19.8: _grad_acc_hooks, _link_all_hp_params, _hp_optimizer_states_linked, _lazy_init_hp_params_optimizer_state of
ZeRO-1/2 (runtime/zero/stage_1_and_2.py) and BF16_Optimizer (runtime/bf16_optimizer.py); Parameter._hp_mapping
(utils/mixed_precision_linkage.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from .partition import FlatLayout


def flatten(layout: FlatLayout) -> Tensor:
    """Return a new buffer with the parameters' values, and point the parameters into it."""
    first = layout.params[0]
    flat = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
    for param in layout.params:
        part = flat[layout.offsets[param] : layout.offsets[param] + param.numel()]
        part.copy_(param.data.view(-1))
        param.data = part.view(param.shape)
    return flat


def unlink(wrapper: Any, groups: Iterable[Iterable[Any]]) -> None:
    """Take the gradient hooks and the links to the masters (utils/mixed_precision_linkage.py) off ZeRO-1/2 or BF16_Optimizer."""
    for hook in wrapper._grad_acc_hooks:
        hook.remove()
    wrapper._grad_acc_hooks = []
    for group in groups:
        for param in group:
            param._hp_mapping = None


def link(wrapper: Any, masters: Sequence[Tensor]) -> None:
    """Link weights, masters and states of ZeRO-1/2 or BF16_Optimizer anew.

    DeepSpeed links the states of all groups after the first group's first step, when the others have none yet, and then raises "not
    found in optimizer state fragment" for those; linking all of them here avoids that.
    """
    wrapper._link_all_hp_params()
    wrapper._hp_optimizer_states_linked = False
    if all(wrapper.optimizer.state.get(m) for m in masters):
        wrapper._lazy_init_hp_params_optimizer_state()


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor is page-locked host memory (offloaded state with pin_memory)."""
    return tensor.device.type == "cpu" and bool(get_accelerator().is_pinned(tensor))


def pinned_if(tensor: Tensor, pinned: bool) -> Tensor:
    """Return `tensor`, page-locked if `pinned`."""
    return get_accelerator().pin_memory(tensor) if pinned else tensor


def set_flags(flags: Sequence[tuple[Parameter, Tensor | None, bool]]) -> None:
    """Give parameters their gradients and `requires_grad` back, as they were noted: (parameter, gradient, requires_grad)."""
    for param, gradient, trains in flags:
        param.grad = gradient
        param.requires_grad_(trains)


def clear_between(buffer: Tensor, held: Iterable[tuple[int, int]]) -> None:
    """Write zeros into the elements of `buffer` that are in none of these (begin, elements), which are sorted."""
    position = 0
    for begin, numel in held:
        if begin > position:
            buffer[position:begin].zero_()
        position = begin + numel
    buffer[position:].zero_()
