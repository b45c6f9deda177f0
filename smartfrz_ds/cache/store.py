"""Rows on this host: files without a name, each row written by one rank and read by all ranks of the host.

There are two files: the index, always in memory, and the rows, in memory or on disk. Both are created without a name (memfd, O_TMPFILE),
readable by their user only, so nothing is left of them when the last rank ends, however it ends. Ranks open them through /proc. A lock on
the index guards it; rows are copied without it, and a reader looks at the index again after the copy, in case the row was let go meanwhile.

The index is memory-mapped, and rows are not: an error of the disk is then an `OSError` and not the end of the process. The lock is a POSIX
record lock, which ends with the process that holds it. One of `flock` would be inherited by forked children (workers of a data loader) and
would outlive a killed rank.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = 0x5346525A0001  # and the version of the format
_ALIGN = 64
_GROWTH = 8 << 20  # bytes that are reserved at once
_SMALLEST = 512  # bytes of a row, on average, for which the index has room
_MOST = 1 << 21  # rows in the index
_RECENT = 1 << 16  # changes of the index that a rank can catch up with one by one
_HEAD = np.dtype(
    [(name, "<u8") for name in ("magic", "limit", "entries", "used", "reserved", "end", "clock", "changes", "evicted", "full", "bytes")]
)
_ENTRY = np.dtype(
    [("key", "V16"), ("offset", "<u8"), ("size", "<u8"), ("used", "<u8"), ("source", "<u8"), ("place", "<u4"), ("ready", "<u4")]
)

Row = Sequence[memoryview]  # the parts of one row, in order


@dataclass(frozen=True)
class Found:
    """A stored row.

    Attributes:
        key: Its key.
        entry: Its position in the index.
        offset: Its first byte in the file.
        source: The batch from which it was stored.
        place: Its position in that batch.
    """

    key: bytes
    entry: int
    offset: int
    source: int
    place: int


class RowStore:
    """Rows in one file and their index. `create` makes both, `join` opens those of another process of this host.

    Args:
        descriptor: The open file of the rows, which this object closes.
        index: That of the index, too.
    """

    def __init__(self, descriptor: int, index: int) -> None:
        self.descriptor, self.index = descriptor, index
        self._map = mmap.mmap(index, os.fstat(index).st_size)
        self._head = np.frombuffer(self._map, _HEAD, 1)[0:1]
        if int(self._head["magic"][0]) != _MAGIC:
            raise ValueError("not a store of this version")
        limit, entries = int(self._head["limit"][0]), int(self._head["entries"][0])
        at = _HEAD.itemsize
        self._log = np.frombuffer(self._map, "<u4", _RECENT, at)
        self._entries = np.frombuffer(self._map, _ENTRY, entries, at + 4 * _RECENT)
        self.limit = limit
        self._known: dict[bytes, int] = {}
        self._seen = 0  # changes of the index that `_known` has

    @classmethod
    def create(cls, limit: int, folder: str | None = None) -> RowStore:
        """Create an empty store.

        Args:
            limit: Bytes for rows.
            folder: A folder on disk; None: memory.

        Raises:
            OSError: It can't be created.
        """
        entries = int(min(_MOST, max(64, limit // _SMALLEST)))
        descriptor = os.memfd_create("smartfrz-prefix-cache") if folder is None else _nameless(Path(folder))
        index = -1
        try:
            os.fchmod(descriptor, 0o600)
            index = os.memfd_create("smartfrz-prefix-cache-index")
            os.fchmod(index, 0o600)
            size = _HEAD.itemsize + 4 * _RECENT + entries * _ENTRY.itemsize
            os.ftruncate(index, size)
            with mmap.mmap(index, size) as whole:
                head = np.frombuffer(whole, _HEAD, 1)
                head["magic"], head["limit"], head["entries"] = _MAGIC, limit, entries
                del head
            return cls(descriptor, index)
        except OSError:
            os.close(descriptor)
            if index >= 0:
                os.close(index)
            raise

    @classmethod
    def join(cls, process: int, descriptor: int, index: int) -> RowStore:
        """Open the store of another process of this user on this host.

        Args:
            process: Its number.
            descriptor: The descriptor of the rows there.
            index: That of the index.

        Raises:
            OSError: It can't be opened, for example because the processes are in different containers.
        """
        rows = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
        try:
            return cls(rows, os.open(f"/proc/{process}/fd/{index}", os.O_RDWR))
        except OSError:
            os.close(rows)
            raise

    def close(self) -> None:
        """Give the memory back once all ranks have closed it."""
        if self.descriptor >= 0:
            del self._head, self._log, self._entries
            self._map.close()
            os.close(self.descriptor)
            os.close(self.index)
            self.descriptor = self.index = -1

    @property
    def rows(self) -> int:
        """Number of rows, of all ranks."""
        return int(self._head["used"][0])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(self._head["bytes"][0])

    @property
    def evicted(self) -> int:
        """How many rows were let go because the store was full."""
        return int(self._head["evicted"][0])

    @property
    def is_full(self) -> bool:
        """Whether a row found no place of its own."""
        return bool(self._head["full"][0])

    def find(self, keys: Sequence[bytes]) -> list[Found | None]:
        """Look rows up, and count them as used."""
        with self._locked():
            self._catch_up()
            clock = self._tick()
            found: list[Found | None] = []
            for key in keys:
                number = self._entry(key)
                if number is None or not self._entries["ready"][number]:
                    found.append(None)
                    continue
                entry = self._entries[number]
                self._entries["used"][number] = clock
                found.append(Found(key, number, int(entry["offset"]), int(entry["source"]), int(entry["place"])))
            return found

    def read(self, found: Sequence[Found], rows: Sequence[Row]) -> bool:
        """Copy rows out of the store.

        Args:
            found: The rows, as `find` returned them.
            rows: Where each goes.

        Returns:
            False if a row was let go meanwhile; what was copied is then worthless.

        Raises:
            OSError: The file can't be read.
        """
        for one, parts in zip(found, rows, strict=True):
            wanted = sum(part.nbytes for part in parts)
            if os.preadv(self.descriptor, list(parts), one.offset) != wanted:
                raise OSError(errno.EIO, "the prefix cache's file is shorter than its index says")
        with self._locked():
            return all(self._entries["key"][x.entry].tobytes() == x.key and self._entries["ready"][x.entry] for x in found)

    def insert(self, keys: Sequence[bytes], rows: Sequence[Row], source: int, places: Sequence[int], *, evict: bool) -> list[int]:
        """Store rows that are not there yet.

        Args:
            keys: The keys of a batch.
            rows: Its rows.
            source: A number for the batch.
            places: The position of each row in the batch.
            evict: Whether a full store lets rows of the same size go, those that were used longest ago first.

        Returns:
            The indices of the rows for which there was no room.

        Raises:
            OSError: The file can't be written.
        """
        size = sum(part.nbytes for part in rows[0]) if rows else 0
        mine: list[tuple[int, int]] = []
        left: list[int] = []
        with self._locked():
            self._catch_up()
            clock = self._tick()
            for place, key in enumerate(keys):
                if self._entry(key) is not None:
                    continue
                number = self._claim(size, clock, evict)
                if number is None:
                    left.append(place)
                    continue
                entry = self._entries[number : number + 1]
                # not ready before the key changes: this process may be killed between any two of these lines
                entry["ready"] = 0
                entry["source"], entry["place"], entry["size"], entry["used"] = source, places[place], size, clock
                entry["key"] = np.void(key)
                self._note(number)
                mine.append((place, number))
            self._catch_up()
        for place, number in mine:
            parts = [part for part in rows[place] if part.nbytes]
            if os.pwritev(self.descriptor, parts, int(self._entries["offset"][number])) != size:
                raise OSError(errno.ENOSPC, "the prefix cache's file can't grow")
        with self._locked():
            for place, number in mine:
                if self._entries["key"][number].tobytes() == keys[place]:
                    self._entries["ready"][number] = 1
        return left

    def _claim(self, size: int, clock: int, evict: bool) -> int | None:
        """Return the position of an entry with room for `size` bytes; None if there is none."""
        head, used = self._head, int(self._head["used"][0])
        room = -(-size // _ALIGN) * _ALIGN
        end = int(head["end"][0])
        if used < len(self._entries) and end + room <= self.limit and self._reserve(end + room):
            self._entries["offset"][used] = end
            head["used"], head["end"] = used + 1, end + room
            head["bytes"] += size
            return used
        head["full"] = 1
        if not evict:
            return None
        entries = self._entries[:used]
        # not one that is being written or was used in this very call
        same = np.nonzero((entries["size"] == size) & (entries["used"] < clock) & (entries["ready"] == 1))[0]
        if not len(same):
            return None
        oldest = int(same[entries["used"][same].argmin()])
        self._known.pop(entries["key"][oldest].tobytes(), None)
        head["evicted"] += 1
        return oldest

    def _reserve(self, end: int) -> bool:
        """Reserve the file's bytes up to `end` of the rows; False if there is no space."""
        reserved = int(self._head["reserved"][0])
        if end <= reserved:
            return True
        for wanted in (min(max(end, reserved + _GROWTH), self.limit), end):
            try:
                os.posix_fallocate(self.descriptor, reserved, wanted - reserved)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
                    raise
            else:
                self._head["reserved"] = wanted
                return True
        return False

    def _entry(self, key: bytes) -> int | None:
        number = self._known.get(key)
        if number is not None and self._entries["key"][number].tobytes() != key:
            del self._known[key]  # let go by another rank
            return None
        return number

    def _catch_up(self) -> None:
        """Learn what other ranks have changed in the index."""
        changes = int(self._head["changes"][0])
        if changes == self._seen:
            return
        if changes - self._seen > _RECENT:
            self._known.clear()
            numbers: Iterator[int] = iter(range(int(self._head["used"][0])))
        else:
            numbers = (int(self._log[k % _RECENT]) for k in range(self._seen, changes))
        for number in numbers:
            self._known[self._entries["key"][number].tobytes()] = number
        self._seen = changes

    def _note(self, number: int) -> None:
        changes = int(self._head["changes"][0])
        self._log[changes % _RECENT] = number
        self._head["changes"] = changes + 1

    def _tick(self) -> int:
        self._head["clock"] += 1
        return int(self._head["clock"][0])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self.index, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.index, fcntl.LOCK_UN)


def _nameless(folder: Path) -> int:
    """Create a file without a name in a folder, for this user only.

    Raises:
        OSError: It can't be created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:  # file systems without it: NFS, for example
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    descriptor, path = tempfile.mkstemp(prefix="smartfrz-prefix-cache-", dir=folder)
    os.unlink(path)
    return descriptor
