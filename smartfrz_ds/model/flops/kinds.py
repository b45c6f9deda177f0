"""FLOPs of a module by its kind, for kernels that cannot be counted; and what tells that a model has such kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from smartfrz_ds.model.finding.facts import class_of, numel_of, shape_of


def counted_modules(tops: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules for which `module_flops` has a formula: those with matrices of their own, and the outermost attention modules."""
    for top in tops:
        yield from _counted(top, within=False)


def _counted(module: nn.Module, *, within: bool) -> Iterator[nn.Module]:
    attends = not within and _is_attention(module)
    if attends or any(len(shape_of(p)) > 1 for p in module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from _counted(child, within=within or attends)


def module_flops(module: nn.Module, x: Tensor, experts: int | None = None) -> float:
    """Return the FLOPs of one forward of a module itself, without its children.

    A lookup costs nothing; a matrix two for each element and position; a convolution likewise, at each position of its output; attention
    4 * batch * length² * width for its two products, as if every position saw every other.

    Args:
        module: A module that `counted_modules` yields.
        x: Its input: (batch, ..., width), or (batch, channels, ...) for a convolution.
        experts: How many experts a position is routed to, if the module is told: of parameters with three dimensions, which hold a
            matrix for each expert, only so many matrices count.
    """
    kind = class_of(module)
    if issubclass(kind, nn.Embedding | nn.EmbeddingBag):
        return 0.0
    own = [p for p in module.parameters(recurse=False) if len(shape_of(p)) > 1]
    positions = x.numel() / max(1, x.shape[-1] if x.ndim else 1)
    conv: Any = module
    if issubclass(kind, nn.modules.conv._ConvNd):
        transposed, channels = issubclass(kind, nn.modules.conv._ConvTransposeNd), x.shape[-len(conv.kernel_size) - 1]
        positions = x.numel() / max(1, channels) / (1 if transposed else prod(conv.stride))
    elif experts is not None and any(len(shape_of(p)) == 3 for p in own):
        own_numel = sum(numel_of(p) * (experts / shape_of(p)[0] if len(shape_of(p)) == 3 else 1.0) for p in own)
        return 2.0 * own_numel * positions
    flops = sum(2.0 * numel_of(p) for p in own) * positions
    if _is_attention(module) and x.ndim == 3:
        batch, length, width = x.shape
        flops += 4.0 * batch * length * length * width
    return flops


def grouped_mm_flops(a: Tensor, b: Tensor) -> float:
    """Return the FLOPs of a product in which groups of rows meet different matrices: two for each row, and element of its matrix.

    Args:
        a: (rows, in), the rows sorted by group; or (groups, rows, in).
        b: (groups, in, out); or (in, rows), its columns sorted by group.
    """
    return 2.0 * b.numel() * a.shape[-2] if a.ndim > b.ndim else 2.0 * a.numel() * b.shape[-1]


def _is_attention(module: nn.Module) -> bool:
    name = class_of(module).__name__.lower()
    return ("attention" in name or name.endswith("attn")) and next(module.parameters(), None) is not None


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model, or a module in it, is torch.compile'd, or is being compiled at this moment."""
    return torch.compiler.is_compiling() or any(
        # torch/nn/modules/module.py: set by Module.compile(); torch/_dynamo/eval_frame.py: OptimizedModule, made by torch.compile(module)
        getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod")
        for m in model.modules()
    )


def uses_flex_attention(model: nn.Module) -> bool:
    """Return whether a forward in the model names FlexAttention, itself or compiled, or its configuration (transformers) does."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention":
        return True
    loaded = sys.modules.get("torch.nn.attention.flex_attention")
    flex = getattr(loaded, "flex_attention", None)
    return flex is not None and any(_original(value) is flex for module in model.modules() for value in _named_by(module))


def _original(value: Any) -> Any:
    return getattr(value, "_torchdynamo_orig_callable", value)  # torch/_dynamo/eval_frame.py


def _named_by(module: nn.Module) -> Iterator[Any]:
    kind = type(module)
    yield from vars(module).values()
    yield from vars(kind).values()
    code, known = getattr(kind.forward, "__code__", None), getattr(kind.forward, "__globals__", {})
    if code is not None:
        yield from (known[name] for name in code.co_names if name in known)
