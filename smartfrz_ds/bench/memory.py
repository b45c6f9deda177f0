"""Resident memory of this process, as counted by Linux.

Set MALLOC_MMAP_THRESHOLD_ (glibc) to about a megabyte before the process starts: every larger tensor then has its own mapping, and freed
memory leaves the process immediately.
"""

from __future__ import annotations

from pathlib import Path

MMAP_THRESHOLD = 2**20


def resident_bytes(*, peak: bool = False) -> int:
    """Return the current resident memory in bytes, or its peak since `reset_peak`. Linux only (/proc)."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Reset the peak to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
