"""Keep gradients flowing into the first active layer under activation checkpointing.

Reentrant checkpointing (torch `use_reentrant=True`, `deepspeed.checkpointing.checkpoint`) runs a region as one
autograd function. Its backward runs only if one of the region's inputs requires grad. Behind a frozen prefix none
does, and the first active layers would silently get no gradient. Therefore the output of the last frozen layer is
made to require grad, outside the region that follows it, and back-propagation still stops there. If a region contains
frozen and active layers, this is done to the layer in front of the region, and the recomputation keeps no graph of
the frozen layers.

transformers makes the input embeddings require grad (`enable_input_require_grads`, part of enabling its
checkpointing). That is correct, but back-propagation then runs through the whole frozen prefix, so this module cuts
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .forward_mode import ForwardMode
from .hooks import ModuleHook, PluginTime
from .layers import Layer


class RecomputeBoundary:
    """Detects layers under reentrant checkpointing, and keeps the boundary behind a frozen prefix open.

    A forward under `torch.no_grad()` is ignored, because it is not trained on. Which layers share a region is learned
    in the first forward. Inside a region, nothing that a layer computes requires grad. The input of a layer therefore
    requires grad if a region begins with the layer, and does not if the region began with a layer in front of it.

    Args:
        layers: All layers, front to back.
        on_late: Called with a module of the first active layer behind a frozen prefix, just before it runs, when that
            layer is first seen under reentrant checkpointing after it had run without: the gradients of that forward
            are lost.
        mode: The forward mode of their model.
        time: Counts the seconds of the hooks, if given.
    """

    def __init__(
        self, layers: Sequence[Layer], on_late: Callable[[nn.Module], None], mode: ForwardMode, time: PluginTime | None = None
    ) -> None:
        self._layers = layers
        self._mode, self._time = mode, time
        self._on_late = on_late
        self._anchors = GradientAnchors()
        self._under: dict[int, bool] = {}  # position of a layer -> seen under reentrant checkpointing
        self._joined: dict[int, bool] = {}  # position of a layer -> whether its region began in front of it
        self._first = 0  # position of the first active layer
        self._frozen: frozenset[str] = frozenset()
        self._marks: list[RemovableHandle] = []
        self._opened: set[nn.Module] = set()  # modules whose output is made to require grad
        self._first_looks = [handle for layer in layers for handle in (*self._watch(layer, once=True), *self._watch_region(layer))]

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of the layers whose region begins in front of them."""
        return {"joined": [layer.position for layer in self._layers if self._began_in_front(layer)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what was learned in forwards with nothing frozen; with a frozen prefix it cannot be learned again."""
        self._joined = {x.position: x.position in state["joined"] for x in self._layers} if "joined" in state else {}
        self.update(self._frozen)

    def update(self, frozen: Collection[str]) -> None:
        """Move the boundary behind the current frozen prefix.

        Args:
            frozen: Names of the frozen layers.
        """
        self._frozen = frozenset(frozen)
        for handle in self._marks:
            handle.remove()
        self._marks.clear()
        self._opened.clear()
        first = next((x.position for x in self._layers if x.numel and x.name not in frozen), 0)
        if not any(x.name in frozen for x in self._layers[:first]):
            return
        self._first = first
        # Watch every forward from now on, because checkpointing may be enabled later.
        self._marks += self._watch(self._layers[first], once=False)
        for module in (m for layer in self._layers[:first] for top in layer.modules for m in top.modules()):
            self._marks += _cut_behind_users_hook(module)
        begin = first  # start of the region that contains the first active layer
        while begin > 0 and self._began_in_front(self._layers[begin]):
            begin -= 1
        # If a region begins with the first layer of the model, its input is the user's, who had to make it require
        # grad from the start.
        if begin > 0:
            self._opened.update(self._mark(self._ends_before(begin), self._open))
        # The rest of a layer may run behind its parts too, with what they have computed: no cut there.
        if begin < first and not self._is_part(self._layers[first]):
            self._mark(self._layers[first - 1].modules, self._cut_recomputed)

    def reopen(self, module: nn.Module, output: Any) -> Any:
        """Make the output of a frozen module require grad as its hook would, where the module itself did not run."""
        return self._open(module, (), output) if module in self._opened else output

    def remove(self) -> None:
        """Remove all hooks, including those that still wait for a first forward."""
        self.update(())
        for handle in self._first_looks:
            handle.remove()

    def _began_in_front(self, layer: Layer) -> bool:
        """Return whether the region of a layer begins in front of it.

        A part that has not run as a module, such as an expert without a token or a list of experts, is taken to continue the region of
        what is in front of it. If that is wrong, back-propagation goes further than it must; the opposite would cut it off.
        """
        joined = self._joined.get(layer.position)
        return self._is_part(layer) if joined is None else joined

    def _is_part(self, layer: Layer) -> bool:
        """Return whether a layer was taken out of another one."""
        return any(layer.name.startswith(f"{other.name}.") for other in self._layers)

    def _ends_before(self, begin: int) -> tuple[nn.Module, ...]:
        """Return the modules whose outputs may enter the layer at position `begin`: those of the layer in front of it.

        If that is a part, or the rest, of a module that ends there, then the whole module and all that belongs to it: a part need not run
        as a module, and the rest may run behind it.
        """
        last, following = self._layers[begin - 1], self._layers[begin].name
        for other in self._layers[:begin]:
            inside = f"{other.name}."
            if other.whole is not None and (last is other or last.name.startswith(inside)) and not following.startswith(inside):
                return (*(m for x in self._layers if x is other or x.name.startswith(inside) for m in x.modules), other.whole)
        return last.modules

    def _mark(self, tops: Sequence[nn.Module], function: Callable[..., Any]) -> list[nn.Module]:
        modules = [module for module in tops if next(module.parameters(), None) is not None]
        self._marks += [module.register_forward_hook(ModuleHook(function, self._time)) for module in modules]
        return modules

    def _watch_region(self, layer: Layer) -> list[RemovableHandle]:
        """Register hooks on the layer itself for its first forward with nothing frozen."""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not module.training or torch.compiler.is_compiling() or self._frozen:
                return
            inside = not torch.is_grad_enabled()
            if inside and self._mode.region() is None:
                return  # torch.no_grad()
            self._joined.setdefault(layer.position, layer.position > 0 and inside and not _any_requires_grad((args, kwargs)))
            for handle in mine:
                handle.remove()

        # In front of ZeRO-3's own hooks, whose copies of the inputs do not require grad inside a region.
        tops = layer.modules if layer.whole is None else (layer.whole,)  # which may compute something before its first module runs
        mine = [top.register_forward_pre_hook(ModuleHook(note, self._time), with_kwargs=True, prepend=True) for top in tops]
        return mine

    def _watch(self, layer: Layer, *, once: bool) -> list[RemovableHandle]:
        """Register hooks on the modules of `layer` that hold weights: a part of a layer may be a region of its own."""

        def note(module: nn.Module, args: Any) -> None:
            if not module.training or torch.compiler.is_compiling():
                return
            known = self._under.get(layer.position)
            reentrant = not torch.is_grad_enabled()
            if reentrant and self._mode.region() is None:
                return  # torch.no_grad()
            if reentrant and known is False and not once:
                self._on_late(module)
            # The recomputation in backward (gradients on) comes second and changes nothing.
            self._under[layer.position] = bool(known) or reentrant
            if once:
                mine.pop(module).remove()

        modules = [m for top in layer.modules for m in top.modules() if next(m.parameters(recurse=False), None) is not None]
        mine = {m: m.register_forward_pre_hook(ModuleHook(note, self._time)) for m in dict.fromkeys(modules)}
        return list(mine.values())

    def _open(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the last frozen layer: make its output require grad."""
        # A layer not seen yet (frozen before the first forward, or just resumed) is assumed to be checkpointed.
        needed = self._under.get(self._first, True) and self._layers[self._first].modules[0].training
        if not needed or torch.is_inference_mode_enabled():
            return output
        if not torch.is_grad_enabled() and self._mode.region() is None:
            return output  # torch.no_grad()
        return _map(output, self._requiring_grad)

    def _cut_recomputed(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the last frozen layer in a region that continues behind it: stop back-propagation in its recomputation."""
        if not torch.is_grad_enabled() or not self._layers[self._first].modules[0].training:
            return output
        return _map(output, lambda tensor: self._requiring_grad(tensor.detach()))

    def _requiring_grad(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad or not tensor.is_floating_point():
            return tensor
        if torch.is_grad_enabled():
            return self._anchors.requiring_grad(tensor)
        # Inside a frozen layer's own region. The output of an autograd function stops requiring grad unless it is a
        # view created without gradients (torch/csrc/autograd/custom_function.cpp, _wrap_outputs). Such a view has no
        # edge, so nothing flows behind it.
        base = tensor.detach().requires_grad_()
        return base.view_as(base)


def _cut_behind_users_hook(module: nn.Module) -> list[RemovableHandle]:
    """Undo, on a frozen module, the effect of the hook of `enable_input_require_grads` (transformers and peft use the same name).

    The new hook runs directly behind it: under ZeRO-3, hooks of DeepSpeed follow, which would already see an output
    that requires grad.
    """
    hooks = module._forward_hooks  # torch/nn/modules/module.py: an ordered dictionary; hooks run in its order
    found = [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == "make_inputs_require_grads"]
    if not found:
        return []
    handle = module.register_forward_hook(_cut)
    order = list(hooks)
    for key in order[order.index(found[-1]) + 1 : -1]:  # the hooks between the two
        hooks[key] = hooks.pop(key)
    return [handle]


def _cut(module: nn.Module, args: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) and output.is_leaf else output


class GradientAnchors:
    """Makes activations require grad although nothing in front of them does. No gradient is passed on."""

    def __init__(self) -> None:
        self._anchors: dict[torch.device, Tensor] = {}

    def requiring_grad(self, tensor: Tensor) -> Tensor:
        """Return a copy that requires grad. Call with gradients on."""
        if tensor.device not in self._anchors:
            self._anchors[tensor.device] = torch.zeros((), device=tensor.device, requires_grad=True)
        copy: Tensor = _Stop.apply(tensor, self._anchors[tensor.device])
        return copy


class _Stop(torch.autograd.Function):
    """A copy of one activation that requires grad and passes no gradient on.

    A copy, because the operations that follow may work in place.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _any_requires_grad(value: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(value))


def _map(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a tensor, or to the tensors of a tuple, list or dict (such as a ModelOutput)."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) in (tuple, list):
        return type(output)(_map(x, change) for x in output)
    if isinstance(output, dict):
        for key, value in output.items():
            output[key] = _map(value, change)
    return output
