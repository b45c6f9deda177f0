"""How the ranks of an engine that gathers weights in forward choose one way for all of them.

If one rank skipped the frozen layers and another did not, the second would wait for the first one's part of their weights. So before each
forward that may be trained on, every rank tells what it could do, in one exchange of 17 bytes, and all do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from hashlib import blake2b
from time import perf_counter

from smartfrz_ds.distributed.collectives import Collectives

from .keys import KEY_BYTES


class Way(IntEnum):
    """What one rank can do with its batch, and what all ranks do. The higher, the more is skipped."""

    OFF = 0  # the cache is of no more use
    PLAIN = 1  # the whole model; nothing is stored
    STORE = 2  # the whole model, and rows are stored
    CARRY = 3  # without the layers that were frozen before; rows are stored
    CHECK = 4  # the whole model, which stored rows are compared with
    PROVE = 5  # both ways
    SKIP = 6  # without the frozen layers


def common_way(wishes: Sequence[Way]) -> Way:
    """Return what all ranks do, given what each could do.

    Batches that can't be proven or checked together with the others run completely; those with all rows may be proven once more.
    """
    lowest = min(wishes)
    if lowest >= Way.CHECK:
        return lowest if lowest is Way.SKIP else Way.PROVE if Way.PROVE in wishes else Way.CHECK
    if lowest is Way.CARRY and max(wishes) > Way.CARRY:
        return Way.STORE
    return lowest


class Agreement:
    """The exchange. Each method is collective.

    The frozen weights are sharded, so a rank sees a change of its own part only. Each rank's digest of its part travels with its wish; the
    digest of all of them stands for the weights in the keys of rows, which the ranks of a host share.

    Args:
        ranks: The ranks that run the forward together.

    Attributes:
        weights: Digest of the frozen weights on all ranks; empty before the first exchange.
    """

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._parts: list[bytes] = []
        self.weights = b""

    def exchange(self, wish: Way, part: bytes) -> tuple[list[Way], bool, float]:
        """Exchange what each rank could do.

        Args:
            wish: What this rank could do.
            part: Digest of this rank's part of the frozen weights.

        Returns:
            The wishes of all ranks; whether the weights are others than at the last exchange, so that this one does not count; seconds.
        """
        began = perf_counter()
        told = self._ranks.gather_bytes(bytes([wish]) + part)
        wishes, parts = [Way(x[0]) for x in told], [x[1:] for x in told]
        changed = parts != self._parts
        if changed:
            self._parts, self.weights = parts, blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()
        return wishes, changed, perf_counter() - began

    def reason(self, own: str) -> str:
        """Return the first rank's reason that is not empty; "" if no rank has one."""
        return next((x for x in self._ranks.gather_objects(own) if x), "")

    def fault(self, own: str, is_fault: bool) -> tuple[str, bool]:
        """Return the first rank's reason to turn the cache off, with its number where that is another one; and whether any is a fault."""
        told = self._ranks.gather_objects((own, is_fault))
        first = next((rank for rank, (text, _) in enumerate(told) if text), self._ranks.rank)
        text = told[first][0]
        return (text if first == self._ranks.rank else f"rank {first}: {text}"), any(fault for _, fault in told)
