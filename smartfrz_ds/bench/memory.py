"""Memory of this process: resident bytes as counted by Linux, and live bytes as counted by torch's allocator.

For resident bytes, set MALLOC_MMAP_THRESHOLD_ (glibc) to about a megabyte before the process starts: every larger tensor then has its own
mapping, and freed memory leaves the process immediately.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

MMAP_THRESHOLD = 2**20


def resident_bytes(*, peak: bool = False) -> int:
    """Return the current resident memory in bytes, or its peak since `reset_peak`. Linux only (/proc)."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> None:
    """Reset the peak of `held_bytes` to the current level."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        get_accelerator().reset_peak_memory_stats()


def held_bytes(device: torch.device, *, peak: bool = False) -> int:
    """Return the bytes of live tensors on an accelerator, or of resident memory for the CPU; or their peak since `reset_peak`."""
    if device.type == "cpu":
        return resident_bytes(peak=peak)
    accelerator = get_accelerator()
    return int(accelerator.max_memory_allocated() if peak else accelerator.memory_allocated())


class AllocatorTrace:
    """Every allocation and release of torch's CPU allocator, in the thread that enters it, exactly.

    Enter it before the tensors of interest are made: the release of a tensor that is older than the trace counts as no bytes. A release in
    another thread is not seen either: gloo's may be the last to hold the buffers of a collective, which then seem to stay.
    """

    _MARK = "smartfrz: rise of live bytes"

    def __enter__(self) -> AllocatorTrace:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(None, None, None)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Mark the part of which `rise` tells. Once per trace."""
        with torch.profiler.record_function(self._MARK):
            yield

    def rise(self) -> tuple[int, int]:
        """Return the peak of live bytes above the level at the begin of the marked part, and the level at its end. After the trace."""
        # torch/autograd/profiler.py keeps them; its public key averages have no order in time.
        profiler = self._profile.profiler
        assert profiler is not None and profiler.kineto_results is not None
        events: list[Any] = profiler.kineto_results.events()
        mark = next(e for e in events if e.name() == self._MARK)
        begin, end = mark.start_ns(), mark.start_ns() + mark.duration_ns()
        within = [e for e in events if e.name() == "[memory]" and begin <= e.start_ns() <= end]
        level = most = 0
        for event in sorted(within, key=lambda e: e.start_ns()):
            level += event.nbytes()
            most = max(most, level)
        return most, level
