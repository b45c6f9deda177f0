"""Resident memory of this process, as Linux counts it.

Set MALLOC_MMAP_THRESHOLD_ (glibc) to about a megabyte before the process starts: then every larger tensor is mapped on its own, and what
is freed leaves the process at once.
"""

from __future__ import annotations

from pathlib import Path

MMAP_THRESHOLD = 2**20


def resident_bytes(*, peak: bool = False) -> int:
    """Bytes of resident memory now, or at their peak since `reset_peak`. Linux only (/proc)."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Let the peak start again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
