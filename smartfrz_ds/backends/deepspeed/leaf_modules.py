"""ZeRO-3 leaf modules: the hooks that reduce their gradients, and leaf modules that DeepSpeed knows only in part.

The weights of a leaf module are gathered together, and one hook on the module reduces all their gradients when its backward has ended.
Touched in DeepSpeed 0.19.8:
  runtime/zero/stage3.py              _leaf_module_hooks, leaf_parameters (create_reduce_and_remove_grad_hooks)
  runtime/zero/parameter_offload.py   Parameter.ds_z3_leaf_module
  utils/z3_leaf_module.py             z3_leaf_module
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from smartfrz_ds.model.activation_checkpointing import GradientAnchors
from smartfrz_ds.model.hooks import ModuleHook

from .base import ZeroParam

Leaves = Mapping[nn.Module, Sequence[ZeroParam]]


def by_leaf(params: Iterable[ZeroParam]) -> tuple[list[ZeroParam], dict[nn.Module, list[ZeroParam]]]:
    """Sort parameters by the leaf module to which they belong.

    Args:
        params: Parameters of a ZeRO-3 engine.

    Returns:
        The parameters outside leaf modules, and for each leaf module its parameters.
    """
    outside: list[ZeroParam] = []
    leaves: dict[nn.Module, list[ZeroParam]] = {}
    for p in params:
        # parameter_offload.py, _register_deepspeed_module: set on the parameters of the outermost leaf module only
        leaf = getattr(p, "ds_z3_leaf_module", None)
        if leaf is None:
            outside.append(p)
        else:
            leaves.setdefault(leaf, []).append(p)
    return outside, leaves


class LeafHooks:
    """The gradient hooks of the leaf modules of one engine. DeepSpeed's own are in effect until the first change of the layout.

    torch runs a full backward hook when the gradient of the module's input is complete, and so are those of its parameters. If no
    input requires grad, as behind a frozen prefix, the hook runs before any of them: DeepSpeed would reduce zeros and release the weights
    that backward still needs. So the inputs of a leaf module with active parameters are made to require grad if none does.

    Args:
        zero: The optimizer wrapper.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._anchors = GradientAnchors()
        self._open_inputs(zero.leaf_parameters)  # stage3.py: {leaf module: its parameters in the optimizer}

    def remove(self) -> None:
        """Remove all hooks, DeepSpeed's own ones too."""
        for hook in self._zero._leaf_module_hooks:  # stage3.py
            hook.remove()
        self._zero._leaf_module_hooks = []

    def make(self, leaves: Leaves, reduce: Callable[[Sequence[ZeroParam]], None]) -> None:
        """Create the hooks for these leaf modules.

        Args:
            leaves: The leaf modules with active parameters, and these parameters.
            reduce: Reduces the gradients of parameters, counted as one hook.
        """
        zero = self._zero
        # created in create_reduce_and_remove_grad_hooks (stage3.py)
        zero.leaf_parameters = {leaf: list(params) for leaf, params in leaves.items()}
        for leaf, params in leaves.items():
            hook = ModuleHook(partial(_reduce_leaf, list(params), reduce))
            zero._leaf_module_hooks.append(leaf.register_full_backward_hook(hook))  # one by one: an undo removes those in the list
        self._open_inputs(leaves)

    def _open_inputs(self, leaves: Iterable[nn.Module]) -> None:
        for leaf in leaves:
            # In front of DeepSpeed's own hooks, which count the inputs that require grad to know when a module's backward has ended. In
            # the list (stage3.py) that DeepSpeed's destroy() goes through.
            opener = ModuleHook(self._open)
            self._zero._leaf_module_hooks.append(leaf.register_forward_pre_hook(opener, prepend=True))

    def _open(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return None
        floating = [isinstance(x, Tensor) and x.is_floating_point() for x in args]
        return tuple(self._anchors.requiring_grad(x) if opens else x for x, opens in zip(args, floating, strict=True))


def _reduce_leaf(
    params: Sequence[ZeroParam], reduce: Callable[[Sequence[ZeroParam]], None], module: nn.Module, grad_input: Any, grad_output: Any
) -> None:
    for p in params:
        if p.grad is None:  # an expert to which no token was routed; every rank must reduce it all the same
            p.grad = torch.zeros_like(p)
    reduce(params)


def describe_partial_leaves(model: nn.Module) -> list[str]:
    """Describe leaf modules whose mark and whose hooks disagree, for a refusal.

    Args:
        model: The module of a ZeRO-3 engine.

    Returns:
        Texts with the remedy.
    """
    late = {type(m).__name__ for m in model.modules() if z3_leaf_module(m) and by_leaf(m.parameters())[0]}
    left = {type(leaf).__name__ for leaf in by_leaf(model.parameters())[1] if not z3_leaf_module(leaf)}
    found = []
    if late:
        found.append(
            f"ZeRO-3 leaf modules that were marked after the engine was created ({', '.join(sorted(late))}): call set_z3_leaf_modules "
            "before deepspeed.initialize; freezing works then"
        )
    if left:
        found.append(
            f"ZeRO-3 leaf modules whose mark was removed after the engine was created ({', '.join(sorted(left))}): call "
            "unset_z3_leaf_modules before deepspeed.initialize, or not at all; freezing works then"
        )
    return found
