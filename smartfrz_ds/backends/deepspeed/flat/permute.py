"""Rearranges a buffer in place, with a few large moves and one staging buffer of bounded size. Each move can be taken back.

A device storage can't be shrunk without a copy, so a freeze leaves the weights where they are and only changes their order. Planning is
arithmetic over sizes; `Permutation` carries a plan out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

PIECE_BYTES = 32 * 2**20
"""What a rearrangement stages at most, twice: a small block, and pieces of what is shifted."""

HOST_PIECE_BYTES = 2**20
"""Bytes of one piece on a host, at most."""

DIRECT_PIECES = 64
"""In how many pieces a shift is carried out without staging, at most."""


@dataclass(frozen=True)
class Swap:
    """Exchange [first, first + numel) with [second, second + numel); the two don't overlap."""

    first: int
    second: int
    numel: int


@dataclass(frozen=True)
class Shift:
    """Turn [left | right], which begins at `begin`, into [right | left]. One of the two fits into the staging buffer."""

    begin: int
    left: int
    right: int


Operation = Swap | Shift


@dataclass(frozen=True)
class Run:
    """Neighbouring elements that stay neighbours. first, last: their target positions among all runs, inclusive."""

    first: int
    last: int
    numel: int


def rotation(begin: int, left: int, right: int, limit: int) -> list[Operation]:
    """Plan to turn [left | right] into [right | left] in place.

    Args:
        begin: Where `left` begins.
        left: Its elements.
        right: Elements of what follows it.
        limit: Elements that fit into the staging buffer, >= 1.
    """
    operations: list[Operation] = []
    while left and right:
        if min(left, right) <= limit:
            operations.append(Shift(begin, left, right))
            break
        # Block swaps: the smaller side gets to its place, the rest is a smaller rotation.
        if left <= right:
            operations.append(Swap(begin, begin + right, left))
            right -= left
        else:
            operations.append(Swap(begin, begin + left, right))
            begin, left = begin + right, left - right
    return operations


def sorting(places: Sequence[int], sizes: Sequence[int], limit: int) -> list[Operation]:
    """Plan to sort neighbouring blocks in place, O(n log k) elements for each level of k runs; sorted input needs nothing.

    Args:
        places: Where each block belongs, 0 to n - 1, each once.
        sizes: Elements of each block.
        limit: As in `rotation`.
    """
    operations: list[Operation] = []
    _sort([Run(place, place, size) for place, size in zip(places, sizes, strict=True)], 0, limit, operations)
    return operations


def _sort(runs: Sequence[Run], begin: int, limit: int, operations: list[Operation]) -> None:
    runs = _merged(runs)
    if len(runs) < 2:
        return
    border = sorted(run.first for run in runs)[len(runs) // 2]
    front, rear = _partition(runs, begin, border, limit, operations)
    _sort(front, begin, limit, operations)
    _sort(rear, begin + _size(front), limit, operations)


def _merged(runs: Sequence[Run]) -> list[Run]:
    """Join neighbours that follow each other."""
    out: list[Run] = []
    for run in runs:
        if out and out[-1].last + 1 == run.first:
            out[-1] = Run(out[-1].first, run.last, out[-1].numel + run.numel)
        else:
            out.append(run)
    return out


def _partition(runs: Sequence[Run], begin: int, border: int, limit: int, operations: list[Operation]) -> tuple[list[Run], list[Run]]:
    """Bring the runs that belong in front of `border` to the front, both parts in their order."""
    if len(runs) == 1:
        return ([*runs], []) if runs[0].first < border else ([], [*runs])
    half = len(runs) // 2
    front_1, rear_1 = _partition(runs[:half], begin, border, limit, operations)
    front_2, rear_2 = _partition(runs[half:], begin + _size(runs[:half]), border, limit, operations)
    operations += rotation(begin + _size(front_1), _size(rear_1), _size(front_2), limit)
    return front_1 + front_2, rear_1 + rear_2


def _size(runs: Sequence[Run]) -> int:
    return sum(run.numel for run in runs)


def moved(operations: Sequence[Operation]) -> int:
    """Return how many elements the operations write, staging included."""
    return sum(3 * op.numel if isinstance(op, Swap) else _shifted(*sorted((op.left, op.right))) for op in operations)


def _shifted(small: int, large: int) -> int:
    return 2 * small + (large if _slides_directly(large, small) else 2 * large)


class Permutation:
    """Carries a plan out on one buffer, and takes it back.

    An operation that raises half-way puts its own elements back before the error goes on, so that `undo` always finds whole operations.

    Args:
        buffer: (n,) contiguous, any dtype.
        operations: The plan, made with `limit`.
        limit: Elements of each half of the staging buffer.
    """

    def __init__(self, buffer: Tensor, operations: Sequence[Operation], limit: int) -> None:
        self._buffer, self._operations = buffer, list(operations)
        self._done = 0
        # On a host, small pieces stay in the cache; on a device, each copy is a launch.
        piece = min(limit, HOST_PIECE_BYTES // buffer.element_size()) if buffer.device.type == "cpu" else limit
        staged = [_staged(op, piece) for op in self._operations]
        self._sizes = max((b for b, _ in staged), default=0), max((p for _, p in staged), default=0)

    def run(self) -> None:
        """Carry out the remaining operations."""
        with self._staging():
            for operation in self._operations[self._done :]:
                self._done += self._carry_out(operation)

    def undo(self) -> None:
        """Take back the completed operations, last one first."""
        with self._staging():
            while self._done:
                operation = self._operations[self._done - 1]
                if isinstance(operation, Shift):
                    operation = Shift(operation.begin, operation.right, operation.left)
                self._done -= self._carry_out(operation)

    @contextmanager
    def _staging(self) -> Iterator[None]:
        self._block, self._piece = (self._buffer.new_empty(size) for size in self._sizes)
        try:
            yield
        finally:
            del self._block, self._piece

    def _carry_out(self, operation: Operation) -> bool:
        """Carry out one operation, whole or not at all.

        Here and below, a line that changes the buffer also returns or counts what it has done: an error that is raised between two lines
        (an interrupt) finds both or neither.

        Returns:
            True.
        """
        return self._swap(operation) if isinstance(operation, Swap) else self._shift(operation)

    def _swap(self, swap: Swap) -> bool:
        step, position = len(self._piece), 0
        begins = range(0, swap.numel, step)
        try:
            for begin in begins[:-1]:
                position += self._exchange(swap.first + begin, swap.second + begin, step)
            begin, size = begins[-1], swap.numel - begins[-1]
            return bool(self._exchange(swap.first + begin, swap.second + begin, size))
        except BaseException:
            while position:
                position -= step
                self._exchange(swap.first + position, swap.second + position, step)
            raise

    def _exchange(self, first: int, second: int, size: int) -> int:
        """Exchange two pieces. Returns their elements."""
        a, b, staged = self._buffer[first : first + size], self._buffer[second : second + size], self._piece[:size]
        staged.copy_(a)
        overwritten = False
        try:
            a.copy_(b)
            overwritten = True
            return b.copy_(staged).numel()
        except BaseException:
            if overwritten:
                b.copy_(a)
            a.copy_(staged)
            raise

    def _shift(self, shift: Shift) -> bool:
        """Set the small side aside, slide the other one over, and put the small side behind or in front of it."""
        small, large = sorted((shift.left, shift.right))
        to_the_left = shift.left == small  # the large side slides to the left, over the place of the small one
        begin = shift.begin
        staged = self._block[:small]
        home = begin if to_the_left else begin + large
        target = begin + large if to_the_left else begin
        staged.copy_(self._buffer[home : home + small])
        source, distance = (begin + small, -small) if to_the_left else (begin, small)
        done = 0
        try:
            done = self._slide(source, large, distance)
            return bool(self._buffer[target : target + small].copy_(staged).numel())
        except BaseException:
            if done == large:
                self._slide(source + distance, large, -distance)
            self._buffer[home : home + small].copy_(staged)
            raise

    def _slide(self, source: int, numel: int, distance: int) -> int:
        """Move `numel` elements by `distance`, in pieces, over a gap of that size.

        Returns:
            `numel`. After an error the elements are where they were.
        """
        direct = _slides_directly(numel, abs(distance))
        step = abs(distance) if direct else len(self._piece)
        positions = [(p, min(step, numel - p)) for p in range(0, numel, step)]
        if distance > 0:
            positions = [(numel - p - size, size) for p, size in positions]
        moved = 0
        try:
            for position, size in positions[:-1]:
                moved += self._copy(source + position, source + position + distance, size, direct=direct)
            position, size = positions[-1]
            return moved + self._copy(source + position, source + position + distance, size, direct=direct)
        except BaseException:
            done = sum(end <= moved for end in accumulate(size for _, size in positions))
            for position, size in reversed(positions[:done]):
                self._copy(source + position + distance, source + position, size, direct=direct)
            raise

    def _copy(self, source: int, target: int, size: int, *, direct: bool) -> int:
        """Copy a piece. Returns its elements."""
        values = self._buffer[source : source + size]
        if not direct:
            values = self._piece[:size].copy_(values)
        return self._buffer[target : target + size].copy_(values).numel()


def _staged(operation: Operation, piece: int) -> tuple[int, int]:
    """Return the elements of the block that an operation sets aside, and of the pieces that it stages: at most `piece`."""
    if isinstance(operation, Swap):
        return 0, min(piece, operation.numel)
    small, large = sorted((operation.left, operation.right))
    return small, 0 if _slides_directly(large, small) else min(piece, large)


def _slides_directly(numel: int, distance: int) -> bool:
    """Whether elements slide by `distance` in pieces of that size, whose source and target don't overlap: not in too many pieces."""
    return numel <= DIRECT_PIECES * distance
