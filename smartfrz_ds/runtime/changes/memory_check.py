"""Checks, before a change of the layout begins, that there is enough memory for it."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smartfrz_ds.backends import memory
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.errors import NotEnoughMemory
from smartfrz_ds.runtime.run_context import RunContext
from smartfrz_ds.telemetry.words import size

UNKNOWN = -1
NUMBERS = 5


@dataclass(frozen=True)
class Place:
    """One rank: its location, its need, and its free memory (bytes; None: unknown)."""

    machine: str
    host: str
    device: str
    need: MemoryNeed
    free: memory.FreeMemory

    @property
    def numbers(self) -> list[int]:
        """A number of the machine, then needed and free bytes of device and host; UNKNOWN where free memory can't be read."""
        machine = int.from_bytes(hashlib.sha256(self.machine.encode()).digest()[:7], "little")
        device, host = (UNKNOWN if free is None else free for free in (self.free.device, self.free.host))
        return [machine, self.need.device, device, self.need.host, host]  # `NUMBERS` of them


def place_of(run: RunContext, need: MemoryNeed) -> Place:
    """Return this rank's place. need: the need of the change on this rank."""
    device, host = run.backend.device, socket.gethostname()
    return Place(f"{host} {_boot_id()}", host, str(device), need, memory.free_memory(device))


def check_memory(run: RunContext, here: Place, numbers: Sequence[Sequence[int]], what: str, *, keep: bool) -> None:
    """Check that every rank, and every host with all of its ranks, has the memory that a change needs. Collective if it lacks.

    Args:
        run: The run.
        here: This rank.
        numbers: `Place.numbers` of all ranks.
        what: The change, for the message: "freeze blocks.0".
        keep: Whether released state is kept on the host.

    Raises:
        NotEnoughMemory: A device or a host is too full; lists all of them, on every rank. Not raised if free memory can't be read.
    """
    if not any_short(numbers):
        return
    places: list[Place] = run.ranks.gather_objects(here)
    short = [*short_devices(places), *short_hosts(places)]
    ways = ["freeze or thaw fewer layers at once", "give the run more memory"]
    if keep:
        ways.insert(0, "set smartfrz.keep_state to 0 (released optimizer state is then not kept on the host)")
    raise NotEnoughMemory(f"not enough memory to {what}: {'; '.join(short)}. Nothing was changed. What helps: {', or '.join(ways)}")


def any_short(numbers: Sequence[Sequence[int]]) -> bool:
    """Whether any device, or any host with all of its ranks, is too full. numbers: `Place.numbers` of all ranks."""
    hosts: dict[int, tuple[int, int]] = {}  # by machine: needed, and the smallest known free memory
    for machine, need_device, free_device, need_host, free_host in numbers:
        if free_device != UNKNOWN and need_device > free_device:
            return True
        needed, free = hosts.get(machine, (0, UNKNOWN))
        hosts[machine] = needed + need_host, free_host if free == UNKNOWN else free if free_host == UNKNOWN else min(free, free_host)
    return any(free != UNKNOWN and needed > free for needed, free in hosts.values())


def short_devices(places: Sequence[Place]) -> list[str]:
    """Return, as text, the ranks whose own device is too full. places: all ranks."""
    return [
        f"rank {rank} ({place.device} of {place.host}) needs {_bytes(place.need.device)}, free are {_bytes(place.free.device)}"
        for rank, place in enumerate(places)
        if place.free.device is not None and place.need.device > place.free.device
    ]


def short_hosts(places: Sequence[Place]) -> list[str]:
    """Return, as text, the hosts that are too full for their ranks together. places: all ranks."""
    short = []
    machines: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        machines.setdefault(place.machine, []).append(rank)
    for ranks in machines.values():
        needed = sum(places[rank].need.host for rank in ranks)
        known = [free for rank in ranks if (free := places[rank].free.host) is not None]
        if needed and known and needed > min(known):
            who = f"rank {ranks[0]}" if len(ranks) == 1 else f"its {len(ranks)} ranks, {ranks[0]} to {ranks[-1]},"
            verb = "needs" if len(ranks) == 1 else "need"
            short.append(f"on host {places[ranks[0]].host} {who} {verb} {_bytes(needed)} of host memory, free are {_bytes(min(known))}")
    return short


def _bytes(count: int) -> str:
    return f"{size(count)} ({count:,} bytes)" if count >= 1000 else f"{count} bytes"


def _boot_id() -> str:
    """Return an identifier that distinguishes hosts of the same name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
