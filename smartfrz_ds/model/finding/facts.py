"""Properties of modules and names in a model, whatever wraps or partitions it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

LISTS = (nn.ModuleList, nn.Sequential)


def class_of(module: nn.Module) -> type:
    """Return the class of a module without its wrappers.

    Wrappers are activation checkpointing, FSDP1, and FSDP2, which replaces the class by one of its own.
    """
    for name in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if name in module._modules and isinstance(inner := module._modules[name], nn.Module):  # a ScriptModule's has no `get`
            return class_of(inner)
    line = type(module).__mro__  # torch/distributed/fsdp/_fully_shard: FSDPBlock, FSDPModule, Block, ...
    return line[2] if line[1].__name__ == "FSDPModule" else line[0]


def shape_of(p: Tensor) -> tuple[int, ...]:
    """Return the full shape of a tensor.

    Args:
        p: A tensor or parameter; whole, partitioned by ZeRO-3 or sharded by FSDP1.
    """
    # ds_shape: full shape of a parameter partitioned by ZeRO-3 (deepspeed/runtime/zero/partition_parameters.py);
    # whole_shape: full shape of a parameter sharded by FSDP1 (backends/torch/fsdp1.py)
    return tuple(getattr(p, "ds_shape", getattr(p, "whole_shape", p.shape)))


def numel_of(p: Tensor) -> int:
    """Return the number of elements of the full tensor.

    Args:
        p: As in `shape_of`.
    """
    return prod(shape_of(p))


def weight_of(module: nn.Module) -> int:
    """Return the number of weights in a module."""
    return sum(numel_of(p) for p in module.parameters())


def has_state(module: nn.Module) -> bool:
    """Return whether a module has parameters, or buffers that a checkpoint holds (running statistics)."""
    return any(m._parameters or set(m._buffers) - m._non_persistent_buffers_set for m in module.modules())


def is_composite(module: nn.Module) -> bool:
    """Return whether a module has both children and parameters."""
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def is_vectors(module: nn.Module) -> bool:
    """Return whether all parameters are vectors, as in a norm."""
    return all(len(shape_of(p)) < 2 for p in module.parameters())


def looks_like_embedding(path: str, module: nn.Module) -> bool:
    """Return whether a module is an embedding, by its class or its name.

    Args:
        path: Dotted name of the module.
        module: The module.
    """
    if issubclass(class_of(module), nn.Embedding):
        return True
    if "embed" not in path.rsplit(".", 1)[-1].lower():
        return False
    # a norm of the embeddings or a patch embedding, but not an output projection named embed_out
    return is_vectors(module) or any(isinstance(m, nn.Embedding | nn.Conv2d) for m in module.modules())


def join(path: str, name: str) -> str:
    """Join a path and a name with a dot."""
    return f"{path}.{name}" if path else name


def parent_of(path: str) -> str:
    """Return the path of the parent module."""
    return path.rpartition(".")[0]


def shared_parts(a: str, b: str) -> int:
    """Return the number of leading parts that two dotted names share.

    Args:
        a: A name, for example "encoder.layers.0".
        b: Another name.
    """
    n = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        n += 1
    return n


def common_parent(paths: Sequence[str]) -> str:
    """Return the longest dotted prefix that all paths share."""
    n = min(shared_parts(paths[0], path) for path in paths[1:])
    return ".".join(paths[0].split(".")[:n])


def example(model: nn.Module) -> str:
    """Show how to list the layers explicitly, with the model's own names."""
    path, module = "", model
    while True:
        kids = [(name, kid) for name, kid in module.named_children() if weight_of(kid)]
        direct = [name for name, _ in module.named_parameters(recurse=False)]
        if len(kids) + len(direct) != 1 or not kids:
            break
        path, module = join(path, kids[0][0]), kids[0][1]
    lists = (nn.ModuleList, nn.ModuleDict)
    names = direct + [f"{name}.*" if isinstance(kid, lists) and len(list(kid.children())) > 1 else name for name, kid in kids]
    listed = ", ".join(f'"{join(path, name)}"' for name in names[:4])
    return f'List them explicitly, front to back, for example: "smartfrz": {{"layers": [{listed}]}}'
