"""The stores of one rank: memory first, then a file on disk; shared by all ranks of a host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b

from .store import Found, Row, RowStore


class Tiers:
    """Rows in memory, and on disk if there is a second store.

    Args:
        stores: One or two stores, the faster one first.
    """

    def __init__(self, stores: Sequence[RowStore]) -> None:
        self._stores = tuple(stores)

    @classmethod
    def create(cls, memory: int, folder: str | None, disk: int) -> Tiers:
        """Create empty stores for the ranks of this host.

        Args:
            memory: Bytes of memory.
            folder: A folder on disk; None: no second store.
            disk: Bytes on disk.

        Raises:
            OSError: A store can't be created.
        """
        stores = [RowStore.create(memory)]
        if folder is not None:
            stores.append(RowStore.create(disk, folder))
        return cls(stores)

    @property
    def address(self) -> tuple[int, list[tuple[int, int]]]:
        """What another rank of this host needs to join: this process, and its descriptors."""
        return os.getpid(), [(x.descriptor, x.index) for x in self._stores]

    @classmethod
    def join(cls, process: int, descriptors: Sequence[tuple[int, int]]) -> Tiers:
        """Open the stores of another process of this host.

        Raises:
            OSError: They can't be opened.
        """
        return cls([RowStore.join(process, *x) for x in descriptors])

    def close(self) -> None:
        """Let the memory and the files go."""
        for store in self._stores:
            store.close()

    def find(self, keys: Sequence[bytes]) -> list[tuple[int, Found] | None]:
        """Look rows up.

        Returns:
            For each key the number of its store and the row.
        """
        found: list[tuple[int, Found] | None] = [None] * len(keys)
        for number, store in enumerate(self._stores):
            missing = [k for k, x in enumerate(found) if x is None]
            for k, one in zip(missing, store.find([keys[k] for k in missing]) if missing else (), strict=True):
                if one is not None:
                    found[k] = number, one
        return found

    def read(self, found: Sequence[tuple[int, Found]], rows: Sequence[Row]) -> bool:
        """Copy rows, as `RowStore.read`."""
        for number, store in enumerate(self._stores):
            chosen = [k for k, (of, _) in enumerate(found) if of == number]
            if chosen and not store.read([found[k][1] for k in chosen], [rows[k] for k in chosen]):
                return False
        return True

    def insert(self, keys: Sequence[bytes], rows: Sequence[Row]) -> None:
        """Store rows that are in no store yet: in the first one with room, else in the last one, where the oldest rows make room."""
        source = int.from_bytes(blake2b(b"".join(keys), digest_size=8).digest())
        left = [k for k, x in enumerate(self.find(keys)) if x is None]
        for store in self._stores:
            if left:
                last = store is self._stores[-1]
                there = store.insert([keys[k] for k in left], [rows[k] for k in left], source, left, evict=last)
                left = [left[k] for k in there]

    @property
    def rows(self) -> int:
        """Number of rows, of all ranks of the host."""
        return sum(x.rows for x in self._stores)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(x.nbytes for x in self._stores)

    @property
    def is_full(self) -> bool:
        """Whether a row found no place of its own."""
        return self._stores[-1].is_full

    @property
    def evicted(self) -> int:
        """How many rows were let go because a store was full."""
        return sum(x.evicted for x in self._stores)
