"""Measures the profile of a model in its first forward.

Counts the multiplications and additions of matrix products, convolutions and fused attention with torch's own
formulas (torch/utils/flop_counter.py), but no elementwise work, no optimizer, and no recomputation of activation
checkpointing. Each product records the layers on which its gradients depend, so the backward for any set of frozen
layers is a sum rather than a new run.

Kernels that do not pass torch's dispatcher (Triton, compiled functions such as FlexAttention), and custom ops, cannot be
counted. They are noticed by what they leave behind, and the layers in which they run are estimated by the kinds of their
modules (kinds.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary

from smartfrz_ds.model.freeze_modules import TiedMode
from smartfrz_ds.model.hooks import ModuleHook, PluginTime
from smartfrz_ds.model.layers import Layer

from .kinds import counted_modules, grouped_mm_flops, is_compiled, module_flops, uses_flex_attention
from .profile import FlopProfile, Gradient, chain_profile

aten = torch.ops.aten
_OPERANDS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2), aten.convolution: (0, 1)}
# missing from torch's registry: fused attention on the CPU
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}

# Missing too: one matrix for each group of rows, as the experts of a mixture have them; transformers has a custom op for where torch's
# kernel cannot run (integrations/moe.py).
_GROUPED = {"aten._grouped_mm", "transformers.grouped_mm_fallback"}


class FlopMeter:
    """Measures a `FlopProfile` in the first forward of a model that builds a graph, without a forward of its own.

    It removes its hooks afterwards. A forward that raises or runs without gradients is not counted. A gradient counts
    if something that it is needed for is active; a path to the loss that is cut (`detach`) is not noticed. Compiled
    functions stay compiled. A torch.compile'd model, or a part of it, runs uncompiled while it is measured; with
    FlexAttention in it, which then does not run at all, nothing is measured.

    Args:
        model: The model to measure.
        layers: From `find_layers`, with nothing frozen yet.
        tied: As in the settings: whether a shared weight outlives its front layer.
        time: Counts the seconds of the hooks, if given.

    Attributes:
        profile: None until that forward has ended.
        estimated: Why the profile is an estimate, or there is none; "" where all was counted.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], tied: TiedMode = "train", time: PluginTime | None = None) -> None:
        self.profile: FlopProfile | None = None
        self.estimated = ""
        self._model = model
        self._flex = uses_flex_attention(model)
        self._mode = _Count(layers, tied)
        self._entered = False
        self._handles = [
            model.register_forward_pre_hook(ModuleHook(self._enter, time), prepend=True, with_kwargs=True),
            model.register_forward_hook(ModuleHook(self._seal, time)),
            model.register_forward_hook(ModuleHook(self._leave, time), always_call=True),
        ]
        # Under FSDP the forward uses whole parameters that temporarily replace the model's.
        self._handles += [
            module.register_forward_pre_hook(ModuleHook(self._meet, time), with_kwargs=True)
            for module in dict.fromkeys((*self._mode.places, *self._mode.kinds))
        ]

    def remove(self) -> None:
        """Remove the hooks; `profile` is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._mode.forget()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() or self._entered or self.estimated:
            return
        compiled = is_compiled(self._model)
        if self._flex and (compiled or not _LETS_COMPILE):
            self.estimated = "FlexAttention in a compiled model cannot run while it is measured: the FLOPs are those of the weights alone"
            self.remove()
            return
        self._mode.reset()
        self._mode.take_inputs((args, kwargs))
        self._mode.beside_compiled = not compiled
        self._mode.__enter__()
        self._entered = True

    def _meet(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._entered:
            self._mode.meet(module, args, kwargs)

    def _seal(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:  # reached only if the forward succeeded
            self.profile, self.estimated = self._mode.profile(), self._mode.estimated()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:
            self._mode.__exit__(None, None, None)
            self._entered = False
        if self.profile is not None:
            self.remove()
            self._mode.reset()


# Whether compiled functions may run beside a mode (torch 2.13); without it they run uncompiled, and FlexAttention does not run.
_LETS_COMPILE = hasattr(TorchDispatchMode, "ignore_compile_internals")
# Of ops that are torch's own: what is not in its registry of FLOPs has none.
_OWN_OPS = frozenset(
    ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "c10d_functional", "_dtensor", "fsdp", "streams", "higher_order")
)


class _Origin(NamedTuple):
    """Where a tensor comes from.

    Attributes:
        layers: Bit mask of the layers whose activity makes its gradient necessary.
        at: Position of the rearmost layer that contributed to it, -1 for none.
        weight: Whether it was computed from parameters alone.
    """

    layers: int
    at: int
    weight: bool


_NOWHERE = _Origin(0, -1, False)


class _Count(TorchDispatchMode):
    """Intercepts each operation of a forward below autograd, where the tensors are those that autograd knows."""

    supports_higher_order_operators = True
    beside_compiled = False

    def ignore_compile_internals(self) -> bool:  # type: ignore[override] # torch asks the mode itself, not its class
        return self.beside_compiled

    def __init__(self, layers: Sequence[Layer], tied: TiedMode) -> None:
        super().__init__()
        self._layers = len(layers)
        self._weights: list[tuple[Tensor, _Origin]] = []
        # bit mask for a parameter's use in an embedding, the only use that is cut when it is frozen
        self._looked_up = WeakTensorKeyDictionary()
        self.places: dict[nn.Module, dict[str, nn.Parameter]] = {}  # the parameters of each module, by name
        for layer in reversed(layers):  # reversed, so that the front layer determines the origin of a shared weight
            for p in (p for top in layer.modules for p in top.parameters() if not p.requires_grad):
                self._weights.append((p, _Origin(0, layer.position, True)))
            for p in layer.params:
                users = [layer, *(other for other in layers if tied == "train" and any(p is q for q in other.borrowed))]
                self._weights.append((p, _Origin(sum(1 << user.position for user in users), layer.position, True)))
                self._looked_up[p] = 1 << layer.position
            for p in layer.borrowed:  # owned by a layer in front, which is visited later and overrides this, or by another process
                self._weights.append((p, _Origin(1 << layer.position, layer.position, True)))
            for module in (m for top in layer.modules for m in top.modules()):
                if held := dict(module.named_parameters(recurse=False)):
                    self.places[module] = held
        self.kinds = {module: layer.position for layer in reversed(layers) for module in counted_modules(layer.modules)}
        self.reset()

    def forget(self) -> None:
        """Drop the weak references to parameters: torch refuses to move a module with DTensors while there are any."""
        self._weights.clear()
        self._looked_up, self._origin = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def reset(self) -> None:
        self._origin = WeakTensorKeyDictionary()
        for p, origin in self._weights:
            self._origin[p] = origin
        self._forward = [0.0] * self._layers
        self._gradients: dict[tuple[bool, int], float] = defaultdict(float)
        self._by_kind = [0.0] * self._layers
        self._unseen: dict[int, str] = {}  # position of a layer -> a kernel in it that could not be counted

    def take_inputs(self, inputs: Any) -> None:
        """Register the model's inputs: everything else in a forward is made of them or of weights."""
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor) and x not in self._origin:
                self._origin[x] = _Origin(0, 0, False)

    def meet(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Register the tensors that currently replace this module's parameters, and the FLOPs of its kind."""
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        x = next((x for x in given if x.is_floating_point()), None)
        if x is not None and (position := self.kinds.get(module)) is not None:
            # the experts of each position, which transformers passes to a bank: (positions, experts per position)
            chosen = [c for c in given if c.ndim == 2 and x.ndim and not c.is_floating_point()]
            numbers = [c.shape[1] for c in chosen if c.shape[0] * x.shape[-1] == x.numel()]
            self._by_kind[position] += module_flops(module, x, *numbers[:1])
        for name, p in self.places.get(module, {}).items():
            now = getattr(module, name, None)
            if isinstance(now, Tensor) and now is not p and p in self._origin:
                self._origin[now] = self._origin[p]
                if p in self._looked_up:
                    self._looked_up[now] = self._looked_up[p]

    def profile(self) -> FlopProfile:
        gradients = [
            Gradient(flops, of_weight, frozenset(i for i in range(self._layers) if mask >> i & 1))
            for (of_weight, mask), flops in self._gradients.items()
        ]
        if self._unseen:  # the gradients that pass the kernel are not known either
            layers = enumerate(zip(self._forward, self._by_kind, strict=True))
            return chain_profile([max(seen, kind) if i in self._unseen else seen for i, (seen, kind) in layers])
        return FlopProfile(tuple(self._forward), tuple(gradients))

    def estimated(self) -> str:
        if not self._unseen:
            return ""
        names = ", ".join(dict.fromkeys(self._unseen.values()))
        return f"{len(self._unseen)} layers run kernels whose FLOPs cannot be counted ({names}): estimated by the kinds of their modules"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        origins = [self._origin.get(x, _NOWHERE) for x in operands]
        if packet is aten.embedding:
            # the lookup, not the weight: only this use of a tied weight is cut when its layer freezes
            origins[0] = origins[0]._replace(layers=self._looked_up.get(operands[0], origins[0].layers))
        # no gradient passes whole numbers: the indices by which a router chooses experts
        carriers = [origin for x, origin in zip(operands, origins, strict=True) if x.is_floating_point() or x.is_complex()]
        mask = 0
        for origin in carriers:
            mask |= origin.layers
        at = max((origin.at for origin in origins), default=-1)
        # without gradients it is inside an autograd function rather than a cut by the user
        if packet is aten.detach and torch.is_grad_enabled():
            mask = 0
        looked_up = packet is aten.embedding  # an activation, whatever it is read from
        made = _Origin(mask, at, bool(carriers) and not looked_up and all(origin.weight for origin in carriers))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._origin[x] = made
        if getattr(func, "namespace", "higher_order") not in _OWN_OPS and packet not in flop_registry and str(packet) not in _GROUPED:
            self._unseen.setdefault(max(at, 0), str(packet))
        self._add(packet, args, kwargs, out, mask, max(at, 0))
        return out

    def _add(self, packet: Any, args: Any, kwargs: Any, out: Any, mask: int, at: int) -> None:
        if packet in _ATTENTION:
            flops = float(sdpa_flop_count(*(x.shape for x in args[:3])))
            self._note(False, mask, 2.5 * flops)  # five products, including the scores again: sdpa_backward_flop_count
        elif packet not in flop_registry and str(packet) not in _GROUPED:
            return
        else:
            grouped = packet not in flop_registry
            flops = grouped_mm_flops(*args[:2]) if grouped else float(flop_registry[packet](*args, **kwargs, out_val=out))
            if grouped or packet in _OPERANDS:
                factors = [self._origin.get(args[i], _NOWHERE) for i in _OPERANDS.get(packet, (0, 1))]
                # A weight behind the first layer, times something that no op of torch's has made of the model's inputs.
                if at > 0 and any(x.weight for x in factors) and any(x.at < 0 for x in factors):
                    self._unseen.setdefault(at, "compiled functions or kernels outside of torch's dispatcher")
                for operand in factors:
                    self._note(operand.weight, operand.layers, flops)
            else:  # an operation that torch counts but this module does not know: assume two gradients
                self._note(False, mask, 2 * flops)
        self._forward[at] += flops

    def _note(self, of_weight: bool, mask: int, flops: float) -> None:
        if mask:
            self._gradients[of_weight, mask] += flops
