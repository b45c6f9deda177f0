"""The memory that a change of the layout needs and releases, and the memory that is free for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smartfrz_ds.distributed.devices import empty_cache, free_device_memory

_WORTH_RETURNING = 0.05  # smallest share of the allocator's memory that is worth the allocations of the next step


@dataclass(frozen=True)
class Released:
    """The result of one change of the layout on this rank.

    Attributes:
        bytes: Optimizer bytes (master weights if they are separate, and state) before minus after; negative for a thaw.
        moved_bytes: Bytes that crossed ranks for it, over all ranks.
    """

    bytes: int
    moved_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that a change holds at most above the level before it, on one rank.

    Attributes:
        device: On the device where the engine's parameters live; 0 where that is the host.
        host: On the host.
    """

    device: int = 0
    host: int = 0

    @classmethod
    def at(cls, device: torch.device, count: int) -> MemoryNeed:
        """Return a need of `count` bytes on this device."""
        return cls(host=count) if device.type == "cpu" else cls(device=count)

    def __add__(self, other: MemoryNeed) -> MemoryNeed:
        return MemoryNeed(device=self.device + other.device, host=self.host + other.host)


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Bytes that this process can still allocate; None where that can't be read.

    Attributes:
        device: On its own device: free memory of the device, and unused memory that torch's allocator has reserved there.
        host: On the host; all processes of the host share it.
    """

    device: int | None = None
    host: int | None = None


def free_memory(device: torch.device) -> FreeMemory:
    """Return the memory that is free for this process. device: the device of its weights."""
    return FreeMemory(device=None if device.type == "cpu" else free_device_memory(device), host=free_host_memory())


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that are left on this host, and in the control groups of this process.

    Args:
        root: The folder with `proc` and `sys`.
    """
    known = [*_available(root / "proc/meminfo"), *_left_in_groups(root)]
    return max(0, min(known)) if known else None


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind `tensors`: a view that pins a large buffer counts in full."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
    return sum(storages.values())


def return_unused(device: torch.device, released: int) -> None:
    """Return the memory that torch's allocator holds without using it to the device, where a change has released enough of it.

    Args:
        device: The device of the change.
        released: Bytes that the change has released on this rank; below 0 if it needs more than before.
    """
    if is_worth_returning(released, _reserved(device)):
        empty_cache(device)


def is_worth_returning(released: int, reserved: int | None) -> bool:
    """Return whether unused memory is worth returning to the device.

    The allocator uses released memory again for what comes, so only others on the device (other processes, libraries with allocators of
    their own) gain by it. The price is that the next step allocates all of its temporary tensors from the device again.

    Args:
        released: Bytes that a change has released.
        reserved: Bytes that the allocator holds; None where unknown.
    """
    return released > 0 and (reserved is None or released >= _WORTH_RETURNING * reserved)


def _reserved(device: torch.device) -> int | None:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None or kind.type != device.type:
        return None
    try:
        return int(torch.accelerator.memory_reserved(device))
    except (AttributeError, NotImplementedError, RuntimeError):  # not every kind of device can say
        return None


def _available(file: Path) -> Iterator[int]:
    """Yield MemAvailable, in bytes, which includes caches that the kernel would reclaim."""
    for line in _lines(file):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left below the limits of this process's control groups and of their parents."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2; on hosts with both versions it is mounted apart
            for top in (mounts, mounts / "unified"):
                yield from _left(top, path, limit="memory.max", used="memory.current", cache="inactive_file")
        elif "memory" in controllers.split(","):
            yield from _left(
                mounts / "memory", path, limit="memory.limit_in_bytes", used="memory.usage_in_bytes", cache="total_inactive_file"
            )


def _left(top: Path, path: str, *, limit: str, used: str, cache: str) -> Iterator[int]:
    """Yield the bytes left in a group and in its parents. In a container the path may be the host's, of which only `top` exists."""
    folder = top if ".." in path else top / path.strip("/")
    for group in (folder, *folder.parents):
        if group == top.parent:
            return
        with suppress(OSError, ValueError):  # no such file at the top; "max": no limit
            inactive = next((int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[0] == cache), 0)
            yield int((group / limit).read_text()) - int((group / used).read_text()) + inactive


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text().splitlines() if line.strip()]
    except OSError:
        return []
