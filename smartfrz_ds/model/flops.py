"""FLOPs of a step for any set of active layers: the one count used by budget, report, planner and benchmarks.

Counts the multiplications and additions of matrix products, convolutions and fused attention with torch's own
formulas (torch/utils/flop_counter.py), but no elementwise work, no optimizer, and no recomputation of activation
checkpointing. Each product records the layers on which its gradients depend, so the backward for any set of frozen
layers is a sum rather than a new run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary

from .freeze_modules import TiedMode
from .hooks import ModuleHook, PluginTime
from .layers import Layer, shape_of

aten = torch.ops.aten
_OPERANDS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2), aten.convolution: (0, 1)}
# missing from torch's registry: fused attention on the CPU
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}


@dataclass(frozen=True)
class Gradient:
    """One kind of product in the backward.

    Attributes:
        flops: Its cost.
        of_weight: Whether it computes the gradient of a weight rather than of an activation.
        layers: Positions of the layers of which at least one must be active for it to be computed.
    """

    flops: float
    of_weight: bool
    layers: frozenset[int]


@dataclass(frozen=True)
class FlopProfile:
    """FLOPs of one forward and its backward (one micro-batch).

    Attributes:
        forward: FLOPs of each layer's forward, front to back.
        gradients: Products of the whole backward.
    """

    forward: tuple[float, ...]
    gradients: tuple[Gradient, ...]


class StepCost(NamedTuple):
    """FLOPs of one forward and backward of one micro-batch."""

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def total(self) -> float:
        """FLOPs of forward and backward."""
        return self.forward + self.backward_input + self.backward_weight


def step_flops(profile: FlopProfile | Sequence[float], frozen: Collection[int]) -> StepCost:
    """Return the cost of a step with some layers frozen.

    The forward is always complete. Gradients of weights are computed for active layers, gradients of activations from
    the end to the first active layer (within that layer, to its first trainable weight).

    Args:
        profile: Measured (`FlopMeter`), estimated (`estimate_profile`), or only the forward FLOPs of each layer
            (`chain_profile`).
        frozen: Positions of the frozen layers.

    Raises:
        ValueError: A position that no layer has.
    """
    if not isinstance(profile, FlopProfile):
        profile = chain_profile(profile)
    wrong = [p for p in frozen if not 0 <= p < len(profile.forward)]
    if wrong:
        raise ValueError(f"frozen: got position {wrong[0]}; allowed: 0 to {len(profile.forward) - 1}")
    still = frozenset(frozen)
    live = [g for g in profile.gradients if not g.layers <= still]
    return StepCost(
        sum(profile.forward),
        sum(g.flops for g in live if not g.of_weight),
        sum(g.flops for g in live if g.of_weight),
    )


def saved_fraction(profile: FlopProfile | Sequence[float], frozen: Collection[int]) -> float:
    """Return the share of an unfrozen step's FLOPs saved with some layers frozen.

    Args:
        profile: As in `step_flops`.
        frozen: Positions of the frozen layers.

    Returns:
        A share in [0, 1); 0 for a model without products.
    """
    whole = step_flops(profile, ()).total
    return 1 - step_flops(profile, frozen).total / whole if whole else 0.0


def chain_profile(forward: Sequence[float]) -> FlopProfile:
    """Build a profile from the forward FLOPs of each layer alone.

    Treats each layer as one product of the previous layer's output and its own weight. Attention, whose backward has
    two input products, is therefore counted slightly too low.
    """
    gradients = [Gradient(flops, True, frozenset([i])) for i, flops in enumerate(forward)]
    gradients += [Gradient(flops, False, frozenset(range(i))) for i, flops in enumerate(forward) if i]
    return FlopProfile(tuple(forward), tuple(gradients))


def estimate_profile(layers: Sequence[Layer], tokens: int) -> FlopProfile:
    """Estimate a profile without a forward: 2 FLOPs per weight and token; vectors and embedding lookups cost nothing.

    Args:
        layers: All layers.
        tokens: Positions of a micro-batch (batch × sequence length), >= 1. Convolutions, which use a weight many
            times per sample, are far underestimated: use `FlopMeter` for them.

    Raises:
        ValueError: `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens: got {tokens}; allowed: an integer >= 1")
    forward = []
    for layer in layers:
        tables = [p for top in layer.modules for m in top.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
        looked_up = {id(p) for p in tables}
        shapes = [torch.Size(shape_of(p)) for p in (*layer.params, *layer.borrowed) if id(p) not in looked_up]
        forward.append(2.0 * tokens * sum(shape.numel() for shape in shapes if len(shape) > 1))
    return chain_profile(forward)


class FlopTally:
    """Counts the training FLOPs of a run so far, in micro-batches of one size.

    Args:
        layers: All layers.

    Attributes:
        profile: The current profile.
        whole: FLOPs with nothing frozen.
        done: FLOPs of what was actually active.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        # Without a measured forward, each weight counts as one multiplication and addition.
        self.profile = chain_profile([2.0 * x.numel for x in layers])
        self._frozen: tuple[int, ...] = ()
        self._a_step = (0.0, 0.0)
        self.whole = self.done = 0.0

    def measured(self, profile: FlopProfile) -> None:
        """Use a measured profile from now on."""
        self.profile = profile
        self._price()

    def set_frozen(self, frozen: Collection[str]) -> None:
        """Set the frozen layers for the following steps.

        Args:
            frozen: Names of the frozen layers. Layers without trainable weights of their own count as frozen anyway.
        """
        self._frozen = tuple(x.position for x in self._layers if x.name in frozen or not (x.numel or x.is_borrower))
        self._price()

    def step(self) -> None:
        """Count one step."""
        self.whole += self._a_step[0]
        self.done += self._a_step[1]

    @property
    def saved_fraction(self) -> float:
        """Share of the training FLOPs saved so far, in [0, 1)."""
        return 1 - self.done / self.whole if self.whole else 0.0

    def _price(self) -> None:
        self._a_step = (step_flops(self.profile, ()).total, step_flops(self.profile, self._frozen).total)


class FlopMeter:
    """Measures a `FlopProfile` in the first forward of a model that builds a graph, without a forward of its own.

    It removes its hooks afterwards. A forward that raises or runs without gradients is not counted. A gradient counts
    if something that it is needed for is active; a path to the loss that is cut (`detach`) is not noticed. A
    torch.compile'd model runs uncompiled while it is measured.

    Args:
        model: The model to measure.
        layers: From `find_layers`, with nothing frozen yet.
        tied: As in the settings: whether a shared weight outlives its front layer.
        time: Counts the seconds of the hooks, if given.

    Attributes:
        profile: None until that forward has ended.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], tied: TiedMode = "train", time: PluginTime | None = None) -> None:
        self.profile: FlopProfile | None = None
        self._mode = _Count(layers, tied)
        self._entered = False
        self._handles = [
            model.register_forward_pre_hook(ModuleHook(self._enter, time), prepend=True),
            model.register_forward_hook(ModuleHook(self._seal, time)),
            model.register_forward_hook(ModuleHook(self._leave, time), always_call=True),
        ]
        # Under FSDP the forward uses whole parameters that temporarily replace the model's.
        self._handles += [module.register_forward_pre_hook(ModuleHook(self._meet, time)) for module in self._mode.places]

    def remove(self) -> None:
        """Remove the hooks; `profile` is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not self._entered:
            self._mode.reset()
            self._mode.__enter__()
            self._entered = True

    def _meet(self, module: nn.Module, args: Any) -> None:
        if self._entered:
            self._mode.meet(module)

    def _seal(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:  # reached only if the forward succeeded
            self.profile = self._mode.profile()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:
            self._mode.__exit__(None, None, None)
            self._entered = False
        if self.profile is not None:
            self.remove()
            self._mode.reset()


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
        self.reset()

    def reset(self) -> None:
        self._origin = WeakTensorKeyDictionary()
        for p, origin in self._weights:
            self._origin[p] = origin
        self._forward = [0.0] * self._layers
        self._gradients: dict[tuple[bool, int], float] = defaultdict(float)

    def meet(self, module: nn.Module) -> None:
        """Register the tensors that currently replace this module's parameters."""
        for name, p in self.places[module].items():
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
        return FlopProfile(tuple(self._forward), tuple(gradients))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        origins = [self._origin.get(x, _NOWHERE) for x in operands]
        if packet is aten.embedding:
            # the lookup, not the weight: only this use of a tied weight is cut when its layer freezes
            origins[0] = origins[0]._replace(layers=self._looked_up.get(operands[0], origins[0].layers))
        mask = 0
        for origin in origins:
            mask |= origin.layers
        at = max((origin.at for origin in origins), default=-1)
        # without gradients it is inside an autograd function rather than a cut by the user
        if packet is aten.detach and torch.is_grad_enabled():
            mask = 0
        made = _Origin(mask, at, bool(origins) and all(origin.weight for origin in origins))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._origin[x] = made
        self._add(packet, args, kwargs, out, mask, max(at, 0))
        return out

    def _add(self, packet: Any, args: Any, kwargs: Any, out: Any, mask: int, at: int) -> None:
        if packet in _ATTENTION:
            flops = float(sdpa_flop_count(*(x.shape for x in args[:3])))
            self._note(False, mask, 2.5 * flops)  # five products, including the scores again: sdpa_backward_flop_count
        elif packet not in flop_registry:
            return
        else:
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
            if packet in _OPERANDS:
                for operand in (self._origin.get(args[i], _NOWHERE) for i in _OPERANDS[packet]):
                    self._note(operand.weight, operand.layers, flops)
            else:  # an operation that torch counts but this module does not know: assume two gradients
                self._note(False, mask, 2 * flops)
        self._forward[at] += flops

    def _note(self, of_weight: bool, mask: int, flops: float) -> None:
        if mask:
            self._gradients[of_weight, mask] += flops
