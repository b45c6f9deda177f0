"""What leaves the frozen prefix in one class of batches, and the rows of one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec

from .store import Row

Call = Callable[[], Any]


class CallDiffers(Exception):
    """The model called its frozen layers in another way than in the forward from which the rows were stored."""


@dataclass(frozen=True)
class Leaf:
    """A part of a skipped module's output.

    Attributes:
        kind: "stored" (comes from the store), "shared" (a tensor that is the same for all batches of the class), "gap" (a tensor that no
            active layer gets), "constant" (not a tensor).
        value: For "stored" its number, for the others what the skipped module returns.
    """

    kind: Literal["stored", "shared", "gap", "constant"]
    value: Any


@dataclass(frozen=True)
class SkippedCall:
    """One call of a frozen module in a forward: the module and its output."""

    module: nn.Module
    structure: TreeSpec
    leaves: tuple[Leaf, ...]

    @property
    def stores(self) -> bool:
        """Whether a part of its output is in the store, or must be the same in all batches."""
        return any(x.kind in ("stored", "shared") for x in self.leaves)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that leaves the prefix, batch dimension first.

    Its strides count too: kernels of active layers, also in backward, sum in another order for another memory format.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """Return the description of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Plan:
    """The calls of frozen modules in front of the first active one, in one class of batches.

    Attributes:
        calls: The calls, in order.
        stored: The tensors that are stored.
    """

    calls: tuple[SkippedCall, ...]
    stored: tuple[StoredTensor, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(x.shape[1:].numel() * x.dtype.itemsize for x in self.stored)


class Rows:
    """The rows of one batch on the host, one tensor for each stored tensor of the plan."""

    def __init__(self, plan: Plan) -> None:
        pinned = any(x.device.type != "cpu" for x in plan.stored)
        self._plan = plan
        self.tensors = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned) for x in plan.stored]

    def views(self) -> list[Row]:
        """Return the memory of each row: one part for each tensor."""
        tables = [x.reshape(-1).view(torch.uint8).reshape(len(x), -1).numpy() for x in self.tensors]
        return [[memoryview(table[index]) for table in tables] for index in range(len(self.tensors[0]))]

    def on_device(self) -> list[Tensor]:
        """Return the tensors where the model expects them."""
        made = []
        for host, about in zip(self.tensors, self._plan.stored, strict=True):
            tensor = host.to(about.device, non_blocking=True)
            if tensor.stride() != about.stride:
                tensor = torch.empty_strided(about.shape, about.stride, dtype=about.dtype, device=about.device).copy_(tensor)
            made.append(tensor)
        return made
