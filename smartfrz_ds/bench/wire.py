"""Counts the bytes that a run passes to torch.distributed."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# The argument with the data that a rank contributes: its position and name in torch.distributed.
_INPUT = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter_single": (1, "input"),
    "reduce_scatter": (1, "input_list"),
    "broadcast": (0, "tensor"),
    "all_to_all_single": (1, "input"),
    "gather": (0, "tensor"),
}
# For a gather of weights the output counts, as it grows with the model.
_OUTPUT = {
    "all_gather": (0, "tensor_list"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_gather_single": (0, "output"),
}


class CollectiveBytes:
    """Wraps the collectives of torch.distributed and sums the bytes that this rank passes to each (for an all-gather: receives).

    Must be created before `deepspeed.init_distributed`: DeepSpeed's backend then keeps references to some of the functions.

    Attributes:
        bytes: Maps a collective's name to the bytes since the last `take`.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._inside = False
        for name, (place, keyword) in (_INPUT | _OUTPUT).items():
            if hasattr(dist, name):
                setattr(dist, name, self._counting(name, place, keyword, getattr(dist, name)))

    def _counting(self, name: str, place: int, keyword: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a collective that calls another one counts once
                return call(*args, **kwargs)
            value = args[place] if len(args) > place else kwargs[keyword]
            tensors = [value] if isinstance(value, torch.Tensor) else value or ()  # gather: None on all ranks but one
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self._inside = True
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False

        return counting

    def take(self) -> dict[str, int]:
        """Return the bytes of each collective since the last call and reset the counts."""
        taken = {name: count for name, count in self.bytes.items() if count}
        self.bytes.clear()
        return taken

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Count the bytes of the block; the counter is filled when the block ends."""
        self.take()
        seen: Counter[str] = Counter()
        yield seen
        seen.update(self.take())
