"""The device that a collective's tensors must be on, and random numbers that are confined to one device.

Private attributes of torch 2.13 used here (torch/distributed/distributed_c10d.py): ProcessGroup._device_types, as in
`_get_object_coll_device`, and bound_device_id.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


def collective_device(tensors: Iterable[Tensor] = (), group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device, with index, on which a process group exchanges this process's tensors. Not collective.

    Before an engine exists, this need not be the process's current device: `deepspeed.init_distributed` binds the group to
    cuda:LOCAL_RANK, and only the engine's constructor makes that the current device.

    Args:
        tensors: Tensors that the caller trains on the group's kind of device, such as a model's parameters. They determine the device if
            the group itself is not bound to one.
        group: The process group; None: the default group.

    Returns:
        The CPU if there is no process group, or if the group has a backend for the CPU (gloo, mpi, "cpu:gloo,cuda:nccl"). Otherwise a
        device of the group's kind: the one to which the group is bound, else that of `tensors`, else the one with index LOCAL_RANK if this
        process sees as many devices, else the process's current device.
    """
    if not dist.is_initialized():
        return CPU
    kinds = _kinds(group)
    if CPU.type in kinds or not kinds:
        return CPU
    kind = kinds[0]
    used: Any = group or dist.group.WORLD
    bound = used.bound_device_id
    if bound is not None and bound.type == kind and bound.index is not None:
        return torch.device(bound)
    placed = next((t.device for t in tensors if t.device.type == kind and t.device.index is not None), None)
    return placed or torch.device(kind, _local_index(kind))


def exchange_device(device: torch.device, group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device on which a process group exchanges tensors of `device`: NCCL, for one, takes no host memory. Not collective.

    Args:
        device: Where the tensors are.
        group: The process group; None: the default group.

    Returns:
        `device` if the group has a backend for its kind, else as `collective_device`.
    """
    return device if device.type in _kinds(group) else collective_device(group=group)


def _kinds(group: dist.ProcessGroup | None) -> list[str]:
    """Return the kinds of devices for which a process group has a backend."""
    known: Any = group or dist.group.WORLD
    return [torch.device(kind).type for kind in known._device_types]


def _local_index(kind: str) -> int:
    """Return the index of this process's own device of this kind."""
    module = getattr(torch, kind, None) or _deepspeed_accelerator() or torch.get_device_module(kind)
    text = os.environ.get("LOCAL_RANK", "")
    # With one visible device per process (srun --gpus-per-task=1), LOCAL_RANK counts processes, not devices.
    if text.isdigit() and int(text) < module.device_count():
        return int(text)
    return int(module.current_device())


def _deepspeed_accelerator() -> Any:
    """Return DeepSpeed's accelerator if this process has loaded DeepSpeed, else None. It knows devices for which torch has no module."""
    get_accelerator = getattr(sys.modules.get("deepspeed.accelerator"), "get_accelerator", None)
    return None if get_accelerator is None else get_accelerator()


def accelerator_for(ranks: int) -> str:
    """Return the accelerator of processes that this one starts on its host, in the terms of DeepSpeed's DS_ACCELERATOR.

    Args:
        ranks: Their number. Each needs a device of its own.

    Returns:
        The value of DS_ACCELERATOR if it is set. Otherwise the kind of this host's accelerators if there are enough of them, else "cpu".
    """
    if chosen := os.environ.get("DS_ACCELERATOR"):
        return chosen
    found = torch.accelerator.current_accelerator() if torch.accelerator.device_count() >= ranks else None
    return CPU.type if found is None else found.type


def device_kind() -> torch.device:
    """Return the kind of device on which this process trains, without an index, as process groups list it."""
    if (accelerator := _deepspeed_accelerator()) is not None:
        return torch.device(accelerator.device_name())
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or CPU


def synchronize(device: torch.device) -> None:
    """Wait until this device has completed all queued work."""
    if device.type != CPU.type:
        (_deepspeed_accelerator() or torch.accelerator).synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Return the unused memory that the allocator of this kind of device holds to the device."""
    if device.type == CPU.type:
        return
    # some kinds of devices have no such allocator
    release = getattr(_deepspeed_accelerator() or torch.get_device_module(device), "empty_cache", None)
    if release is not None:
        release()


def free_device_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; None where neither torch nor DeepSpeed knows.

    That is what the device has left, and what torch's allocator holds back for this process without using it.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        if kind is not None and kind.type == device.type:
            left, _ = torch.accelerator.get_memory_info(device)
            return left + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        if (own := _deepspeed_accelerator()) is not None and own.device_name() == device.type:
            held = (own.memory_reserved(device.index) or 0) - own.memory_allocated(device.index)
            return int(own.available_memory(device.index) + max(0, held))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # not every kind of device can say
        return None
    return None


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the random state of the CPU and of `device` at the end of the block. No other device is used.

    torch.random.fork_rng() without a list of devices would open a context on every visible GPU.
    """
    kind = device.type if device.type != CPU.type else "cuda"
    devices = [device.index] if device.type != CPU.type and device.index is not None else []
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield
