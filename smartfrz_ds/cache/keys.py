"""Keys of the rows of a batch: what a row's result in the frozen prefix can depend on, as 128 bits.

The key of a row covers the bytes of that row in every tensor that the model was given, whether the prefix reads it or not, the shapes
and dtypes of the whole batch, every argument that is not a tensor, and the state of the prefix (state.py). A sum of hashed elements would
be faster, but such keys collide for neighbouring tokens (+16/−8); BLAKE2 does not.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

KEY_BYTES = 16
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward, as keys.

    Attributes:
        rows: Number of rows.
        kind: Digest of what the rows of a class have in common: shapes, dtypes, the other arguments, the state of the prefix.
        keys: One key for each row.
    """

    rows: int
    kind: bytes
    keys: tuple[bytes, ...]


def describe(args: Sequence[Any], kwargs: Mapping[str, Any], state: bytes) -> Batch | str:
    """Return the keys of a call of the model, or why it has none.

    The batch dimension is the first one; its size is the most frequent first dimension of the tensors. A tensor with another first
    dimension belongs to every row. Where the batch size equals another dimension of a tensor, rows can't be told from columns: the key of
    each row then covers the whole batch and the row's position, so that only the same batch in the same order hits.

    Args:
        args: Positional arguments of the model.
        kwargs: Its named arguments.
        state: Digest of the state of the prefix.

    Returns:
        The keys; or the reason, as text, if an argument has no bytes that can be hashed.
    """
    paths, structure = tree_flatten_with_path((tuple(args), dict(kwargs)))
    common = blake2b(state, digest_size=KEY_BYTES)
    common.update(repr(structure).encode())
    tensors: list[Tensor] = []
    for path, leaf in paths:
        if isinstance(leaf, Tensor):
            if type(leaf) is not Tensor and not isinstance(leaf, torch.nn.Parameter):
                return f"the argument {_name(path)} is a {type(leaf).__name__}, whose bytes can't be read"
            if leaf.layout is not torch.strided or leaf.is_quantized:
                return f"the argument {_name(path)} is not a dense tensor"
            if leaf.requires_grad:
                return f"the argument {_name(path)} requires a gradient, which flows through the frozen layers"
            common.update(f"{leaf.dtype} {tuple(leaf.shape)} {leaf.device};".encode())
            tensors.append(leaf)
        elif isinstance(leaf, _CONSTANTS):
            common.update(f"{type(leaf).__name__} {leaf!r};".encode())
        else:
            return f"the argument {_name(path)} is a {type(leaf).__name__}, which has no key"
    sizes = Counter(x.shape[0] for x in tensors if x.ndim)
    if not sizes or not (rows := sizes.most_common(1)[0][0]):
        return "the model was given no tensor with rows"
    by_row = [x for x in tensors if x.ndim and x.shape[0] == rows]
    others = [x for x in tensors if not (x.ndim and x.shape[0] == rows)]
    kind = common.digest()
    for other in others:
        common.update(_bytes_of(other, 1))
    table = _bytes_of(torch.cat([_as_bytes(x, rows) for x in by_row], 1), rows)
    if len(tensors) > 1 and any(rows in x.shape[1:] for x in tensors):
        common.update(table)
        return Batch(rows, kind, tuple(_key(common, index.to_bytes(8)) for index in range(rows)))
    width = len(table) // rows
    return Batch(rows, kind, tuple(_key(common, table[index * width : (index + 1) * width]) for index in range(rows)))


def _key(common: Any, row: bytes | memoryview) -> bytes:
    one = common.copy()
    one.update(row)
    return bytes(one.digest())


def _as_bytes(tensor: Tensor, rows: int) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).reshape(rows, -1)


def _bytes_of(tensor: Tensor, rows: int) -> memoryview:
    whole = tensor if tensor.ndim else tensor.reshape(1)
    if not whole.numel():
        return memoryview(b"")
    return whole.detach().contiguous().view(torch.uint8).reshape(-1).cpu().numpy().data


def _name(path: Any) -> str:
    return "".join(str(part) for part in path[1:]) or "?"
