"""Reading sampled weights where an engine holds them: one gather for each kind of memory, however many tensors there are.

A 7B model has hundreds of sampled matrices, a mixture of experts tens of thousands, each in memory of its own. A kernel for each of them
would cost more than the read. All tensors of one device are in one address space, so a single `index_select` over that space, with each
element's address as its index, reads them all (multi-tensor optimizers pass pointers to their kernels for the same reason). The addresses
are compared with those of the tensors before every read. `read_each` is the obvious way, for all other kinds of tensors, and the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

_TYPESTR = {torch.float64: "<f8", torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}


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


@dataclass(frozen=True)
class _Gather:
    """The samples in the tensors of one device and dtype.

    Attributes:
        device: Their device.
        dtype: Their dtype.
        first: The lowest address of these tensors, in bytes.
        count: Elements of this dtype from there to the last sample.
        index: (n,) int64 on `device`: position of each sample, in elements from `first`.
        slots: (n,) int64 on the snapshot's device.
    """

    device: torch.device
    dtype: torch.dtype
    first: int
    count: int
    index: Tensor
    slots: Tensor

    def values(self) -> Tensor:
        """Return the (n,) samples, in the dtype and on the device of the tensors."""
        return _memory(self.device, self.dtype, self.first, self.count).index_select(0, self.index)


class Sampler:
    """The sampled weights of one layout: which elements of which local tensors fill which slots.

    Args:
        numel: Elements of the flattened snapshot.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self._tensors: list[Tensor] = []
        self._elements: list[list[Tensor]] = []  # of each tensor
        self._slots: list[list[Tensor]] = []
        self._position: dict[int, int] = {}  # of each tensor, by identity
        self._addresses: list[int] | None = None
        self._plain = False  # whether none of the tensors is of a subclass
        self._gathers: list[_Gather] = []
        self._others: list[int] = []  # positions of the tensors that no gather reads
        self._other_elements: Sequence[Tensor] = []  # of each of them, on its device
        self._other_slots = torch.arange(0)

    def add(self, tensor: Tensor, elements: Tensor, slots: Tensor) -> None:
        """Add the samples in one tensor.

        Args:
            tensor: A tensor that this rank holds. Another storage may be assigned to it later, of the same shape and strides.
            elements: (n,) int64 on the host, indices into the flattened tensor.
            slots: (n,) int64 on the host, their positions in the snapshot.
        """
        if not len(elements):
            return
        if (position := self._position.setdefault(id(tensor), len(self._tensors))) == len(self._tensors):
            self._tensors.append(tensor)
            self._elements.append([])
            self._slots.append([])
        self._elements[position].append(elements)
        self._slots[position].append(slots)
        self._addresses = None

    def sources(self) -> Sequence[Tensor]:
        """Return the tensors to read, in the order in which they were added."""
        return self._tensors

    @torch.no_grad()
    def read(self, device: torch.device) -> Tensor:
        """Return a (numel,) fp32 tensor on `device` with this rank's samples in their slots and zeros elsewhere. Waits for nothing."""
        tensors = self.sources()
        # The kinds of the tensors never change, only what they hold.
        if self._addresses is None or self._addresses != (list(map(Tensor.data_ptr, tensors)) if self._plain else _addresses(tensors)):
            self._compile(tensors, device)
        out = torch.zeros(self.numel, dtype=torch.float32, device=device)
        for gather in self._gathers:
            out.index_copy_(0, gather.slots, gather.values().to(device=device, dtype=torch.float32))
        if self._others:
            values = read_each([tensors[i] for i in self._others], self._other_elements, device)
            out.index_copy_(0, self._other_slots, values)
        return out

    def _compile(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Sort the tensors by kind, and compute the addresses of their samples."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        others: list[int] = []
        for position, tensor in enumerate(tensors):
            if _is_addressable(tensor):
                kinds.setdefault((tensor.device, tensor.dtype), []).append(position)
            else:
                others.append(position)
        self._gathers = []
        for (where, dtype), positions in kinds.items():
            gather = self._gather([tensors[i] for i in positions], positions, where, dtype, device)
            if where.type == "cpu" or self._is_right(gather, tensors, positions):
                self._gathers.append(gather)
            else:
                others += positions
        self._others = others
        self._other_elements = _beside([tensors[i] for i in others], self._elements_of(others))
        self._other_slots = self._slots_of(others).to(device)
        self._addresses = _addresses(tensors)
        self._plain = all(type(tensor) in (Tensor, Parameter) for tensor in tensors)

    def _elements_of(self, positions: Sequence[int]) -> list[Tensor]:
        return [torch.cat(self._elements[i]) for i in positions]

    def _slots_of(self, positions: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(0), *(slots for i in positions for slots in self._slots[i])])

    def _gather(
        self, tensors: Sequence[Tensor], positions: Sequence[int], where: torch.device, dtype: torch.dtype, device: torch.device
    ) -> _Gather:
        elements = self._elements_of(positions)
        counts = torch.tensor([len(e) for e in elements])
        sizes = torch.tensor([t.numel() for t in tensors]).repeat_interleave(counts)
        if bool(((flat := torch.cat(elements)) < 0).any()) or bool((flat >= sizes).any()):
            raise IndexError("a sampled element is outside of its tensor")  # an address is not checked by index_select
        first = min(t.data_ptr() for t in tensors)
        begins = torch.tensor([(t.data_ptr() - first) // dtype.itemsize for t in tensors]).repeat_interleave(counts)
        index = begins + torch.cat([_in_memory(t, e) for t, e in zip(tensors, elements, strict=True)])
        return _Gather(where, dtype, first, int(index.max()) + 1, index.to(where), self._slots_of(positions).to(device))

    def _is_right(self, gather: _Gather, tensors: Sequence[Tensor], positions: Sequence[int]) -> bool:
        """Whether a gather reads what `read_each` reads, where no test of this package has run: on a device. Waits for it."""
        expected = read_each([tensors[i] for i in positions], self._elements_of(positions), gather.device)
        try:
            return torch.equal(gather.values().float().view(torch.int32), expected.view(torch.int32))  # bits: NaN equals NaN
        except (RuntimeError, TypeError, ValueError):
            return False


def read_each(tensors: Sequence[Tensor], elements: Sequence[Tensor], device: torch.device) -> Tensor:
    """Read the samples tensor by tensor.

    Args:
        tensors: The tensors.
        elements: For each of them (n,) int64, indices into the flattened tensor.
        device: Where the result is needed.

    Returns:
        (sum of all n,) fp32, in order.
    """
    parts = [torch.empty(0, device=device)]
    for tensor, chosen in zip(tensors, elements, strict=True):
        data, where = tensor.detach(), chosen.to(tensor.device)
        # not contiguous: channels_last, or a view of the user's
        values = data.view(-1).index_select(0, where) if data.is_contiguous() else data[torch.unravel_index(where, data.shape)]
        parts.append(values.to(device=device, dtype=torch.float32))
    return torch.cat(parts)


def _beside(tensors: Sequence[Tensor], elements: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copy the indices to the devices of their tensors, those of one device together."""
    placed = list(elements)
    for device in dict.fromkeys(t.device for t in tensors):
        numbers = [k for k, t in enumerate(tensors) if t.device == device]
        together = torch.cat([elements[k] for k in numbers]).to(device)
        for k, part in zip(numbers, together.split([len(elements[k]) for k in numbers]), strict=True):
            placed[k] = part
    return placed


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() if type(tensor) in (Tensor, Parameter) else 0 for tensor in tensors]


def _is_addressable(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie at addresses that its strides tell."""
    plain = type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()
    if not plain or tensor.device.type not in ("cpu", "cuda") or tensor.dtype not in _TYPESTR:
        return False
    return tensor.data_ptr() != 0 and tensor.data_ptr() % tensor.dtype.itemsize == 0


def _in_memory(tensor: Tensor, elements: Tensor) -> Tensor:
    """Return the offsets of these elements of the flattened tensor from its first one in memory, in elements."""
    if tensor.is_contiguous():
        return elements
    along = torch.unravel_index(elements, tensor.shape)
    return sum((at * step for at, step in zip(along, tensor.stride(), strict=True)), torch.zeros_like(elements))


class _Device:
    """Memory of a CUDA device, described for torch.as_tensor."""

    def __init__(self, first: int, count: int, typestr: str) -> None:
        self.__cuda_array_interface__ = {"data": (first, False), "shape": (count,), "typestr": typestr, "strides": None, "version": 3}


def _memory(device: torch.device, dtype: torch.dtype, first: int, count: int) -> Tensor:
    """Return a view of `count` elements of memory from the address `first` on, the gaps between tensors included.

    Only elements of tensors that are alive may be read. The view must not outlive the call: never store, copy or print it.
    """
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_byte * (count * dtype.itemsize)).from_address(first), dtype=dtype)
    return torch.as_tensor(_Device(first, count, _TYPESTR[dtype]), device=device).view(dtype)
