"""A GPU that has no memory and no arithmetic, on a machine without one: code that mixes devices raises here as it would there.

Tensors on the CPU are real. Those on "cuda" are torch's fake tensors, which have a shape, a dtype, a device, strides and storages, and no
values. DeepSpeed, FSDP2 and the backends run on them unchanged. An error is raised by

- a kernel that gets tensors on two devices (torch's own rule for fake tensors);
- an index on the host for a tensor on the GPU, which eager torch copies silently, so that the host waits;
- a read of a value on the GPU (`.item()`, `.tolist()`, `bool()`, `nonzero()`): the host would wait for the GPU.

Copies between the host and the GPU are allowed and recorded, so that a test says what may be copied.

Private attributes of torch 2.13 used here: _subclasses/fake_tensor.py: FakeTensorMode, unset_fake_temporarily; UntypedStorage._cdata, an
address that tells fake storages apart, whose data_ptr() is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default, aten.copy.default}


class MixedDevices(AssertionError):
    """A kernel got tensors on two devices."""


@dataclass(frozen=True)
class Copy:
    """A copy between the host and the GPU."""

    to_host: bool
    numel: int
    nbytes: int


@dataclass
class FakeGpu(TorchDispatchMode):
    """Runs what concerns the CPU alone as always, and the rest on fake tensors. Active inside of `fake`."""

    fake: FakeTensorMode
    copies: list[Copy] = field(default_factory=list)
    strict: bool = True  # whether reading a value on the GPU is an error; False: it is 1

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        asked = [x for x in leaves if isinstance(x, torch.device)]
        if not any(isinstance(t, FakeTensor) for t in tensors) and not any(d.type == "cuda" for d in asked):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and not self.strict:
            return 1
        places = {t.device.type for t in tensors if t.ndim > 0}
        if func in COPIES:
            self._note(func, tensors, asked)
        elif len(places) > 1 and func is not aten.set_.source_Storage:
            raise MixedDevices(f"{func}: {[(tuple(t.shape), str(t.device)) for t in tensors]}")
        if func in (aten.copy_.default, aten._foreach_copy_.default) and not isinstance(tensors[0], FakeTensor):
            return args[0]  # to the host, which keeps what it has: there are no values to copy
        return tree_map(_real_on_host, func(*args, **kwargs))

    def _note(self, func: Any, tensors: list[Tensor], asked: list[torch.device]) -> None:
        if func is aten._to_copy.default:
            pairs = [(tensors[0], asked[0] if asked else tensors[0].device)]
        elif func is aten._foreach_copy_.default:
            half = len(tensors) // 2
            pairs = [(source, target.device) for target, source in zip(tensors[:half], tensors[half:], strict=True)]
        else:
            pairs = [(tensors[1], tensors[0].device)]
        for source, target in pairs:
            if source.device.type != target.type:
                self.copies.append(Copy(target.type == "cpu", source.numel(), source.numel() * source.element_size()))


def _real_on_host(value: Any) -> Any:
    """What a kernel made on the host out of fake tensors, such as a copy of one: zeros."""
    if not isinstance(value, FakeTensor) or value.device.type != "cpu":
        return value
    with unset_fake_temporarily():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()


_storage_address, _true_address = torch.UntypedStorage.data_ptr, Tensor.data_ptr


def _address(self: torch.UntypedStorage) -> int:
    fake = self.device.type == "meta" and self.nbytes()
    return int(self._cdata) if fake else _storage_address(self)


def _tensor_address(self: Tensor) -> int:
    if not isinstance(self, FakeTensor):
        return _true_address(self)
    return _address(self.untyped_storage()) + self.storage_offset() * self.element_size()


@contextmanager
def fake_gpu(*, rank: int = 0, world: int = 2) -> Iterator[FakeGpu]:
    """This process as `rank` of a process group whose collectives move nothing, with one fake GPU. Autograd is off: its nodes ask the
    driver for streams."""
    if not torch.cuda.is_available():
        cpp_extension.load("smartfrz_fake_gpu", [str(Path(__file__).with_suffix(".cpp"))], is_python_module=False)
    dist.init_process_group("cuda:fake", store=FakeStore(), rank=rank, world_size=world)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fake.cache_enabled = False  # the cache can't make a view of a fake tensor whose data is real by now
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(torch.UntypedStorage, "data_ptr", _address))
            stack.enter_context(patch.object(Tensor, "data_ptr", _tensor_address))
            stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
            stack.enter_context(patch.object(torch.cuda, "current_device", lambda: 0))
            stack.enter_context(patch.object(dist, "barrier", lambda *args, **kwargs: None))
            stack.enter_context(fake)
            stack.enter_context(torch.no_grad())
            yield stack.enter_context(FakeGpu(fake))
    finally:
        dist.destroy_process_group()


def on_gpu(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Give a model on the CPU parameters and buffers on the fake GPU."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype, device=GPU))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=GPU)
    return model
