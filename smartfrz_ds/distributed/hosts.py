"""Which ranks are on one host, as all ranks agree on it."""

from __future__ import annotations

import socket
from pathlib import Path

from .collectives import Collectives


def name_of_this_host() -> str:
    """Return a name that processes have in common if they can share memory: containers of one machine may have different ones."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def hosts_of_ranks(ranks: Collectives) -> tuple[int, ...]:
    """Return the number of each rank's host; hosts are numbered by their first rank. Collective.

    A launcher's variables (LOCAL_WORLD_SIZE) say nothing about other hosts, which may have another number of ranks; so all ranks are asked.
    """
    names = ranks.gather_objects(name_of_this_host())
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(order[name] for name in names)
