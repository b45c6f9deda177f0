"""Reading sampled weights where an engine holds them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class SampleRequest:
    """The sampled weights of one parameter, and their positions in the snapshot.

    Attributes:
        param: The parameter.
        elements: (n,) int64, indices into the flattened parameter.
        slots: (n,) int64, positions in the flattened snapshot [layers, sample_size].
    """

    param: Parameter
    elements: Tensor
    slots: Tensor


@dataclass
class Sampler:
    """Requests compiled against one layout: for each local buffer, which of its elements fill which slots."""

    numel: int
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # (buffer, its elements, slots)

    @torch.no_grad()
    def read(self, device: torch.device) -> Tensor:
        """Return a (numel,) fp32 tensor with this rank's samples in their slots and zeros elsewhere."""
        out = torch.zeros(self.numel, dtype=torch.float32, device=device)
        for buffer, elements, slots in self.parts:
            data = buffer.detach()
            # not contiguous: channels_last, or a view of the user's
            flat = data.is_contiguous()
            values = data.view(-1).index_select(0, elements) if flat else data[torch.unravel_index(elements, data.shape)]
            out.index_copy_(0, slots.to(device), values.to(device=device, dtype=torch.float32))
        return out
