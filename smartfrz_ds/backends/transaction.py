"""A change of an engine's layout that all ranks either carry out or take back.

The code of a change reads straight down. Each part that changes something is a `step` with the action that undoes it; before and after each
collective all ranks vote; memory that the change no longer needs is released after the last vote:

    with tx.step("unlink", undo=self.relink):
        ...                                   # local: an error here brings every rank back
    with tx.exchange("move the moments"):
        ...                                   # collective: an error here ends the run
    tx.on_commit(old.clear)

An error that one rank raises between votes reaches the others at their next vote. Then every rank undoes its own steps, last one first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.errors import FreezeError


class ChangeFailed(Exception):
    """A vote failed: some rank can't go on. Raised on every rank, and caught by the code that runs the transaction."""


@dataclass(frozen=True)
class _Undo:
    name: str
    action: Callable[[], None]
    collective: bool


class Transaction:
    """One change of the layout. The caller ends it with `finish` or, after any error, with `roll_back`.

    Attributes:
        broken: Whether a collective failed half-way, so that nothing can be undone.
    """

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._undo: list[_Undo] = []
        self._on_commit: list[Callable[[], None]] = []
        self._heard = False  # whether a vote has told all ranks of the failure already
        self._committed = False
        self._error: Exception | None = None  # a local error within the current exchange
        self.broken = False

    @contextmanager
    def step(self, name: str, undo: Callable[[], None] | None = None) -> Iterator[None]:
        """Run a local part of the change.

        Args:
            name: Description for messages.
            undo: Takes it back, wherever in the block an error was raised. None: nothing needs to be undone.
        """
        if undo is not None:
            self._undo.append(_Undo(name, undo, collective=False))
        yield

    @contextmanager
    def exchange(self, name: str, undo: Callable[[], None] | None = None, *, alone: bool = False) -> Iterator[None]:
        """Run a collective part, with a vote before and after it.

        The block must catch its own local errors and pass them to `fail_later`, so that it takes part in all of its collectives. Any error
        that leaves it means that the collective failed half-way.

        Args:
            name: Description for messages.
            undo: Takes it back, collectively, once it has succeeded on every rank. Where it hasn't, nothing is undone here: its targets
                must not be in use before the second vote.
            alone: Whether nothing crosses ranks, on any rank: then no votes are held, and an error is like that of a `step`.
        """
        self._error = None
        if not alone:
            self.vote()
        try:
            yield
        except BaseException:
            self.broken = not alone
            raise
        if self._error is not None:
            raise self._error
        if not alone:
            self.vote()
        if undo is not None:
            self._undo.append(_Undo(name, undo, collective=not alone))

    def most(self, count: int) -> int:
        """Return the largest `count` of all ranks, after a vote. Collective."""
        self.vote()
        return -int(self._ranks.all_reduce_min([-float(count)])[0])

    def wait(self, exchanges: int) -> None:
        """Take part in the votes of exchanges that concern other ranks only. Collective."""
        for _ in range(exchanges):
            with self.exchange("wait for other ranks", undo=lambda: None):
                pass

    def fail_later(self, error: Exception) -> None:
        """Note a local error within an `exchange`: it is raised once the block's collectives are through."""
        self._error = self._error or error

    def on_commit(self, action: Callable[[], None]) -> None:
        """Run `action` after the last vote: it releases everything that only a rollback would need. It must not fail."""
        self._on_commit.append(action)

    def vote(self) -> None:
        """Tell all ranks that this one can go on. Collective.

        Raises:
            ChangeFailed: Another rank cannot.
        """
        if self._failed_somewhere(failed=False):
            self._heard = True
            raise ChangeFailed("another rank could not go on")

    def finish(self) -> None:
        """Hold the last vote, then run the actions of `on_commit`. Collective.

        Raises:
            ChangeFailed: Another rank can't go on; the change is still to be rolled back.
        """
        self.vote()
        self._committed = True
        self._undo.clear()
        for action in self._on_commit:
            action()
        self._on_commit.clear()

    def roll_back(self, error: Exception) -> str:
        """Bring every rank back to the previous layout. Collective, on every rank, after any error.

        Args:
            error: The error of this rank: its own, or the `ChangeFailed` of a vote.

        Returns:
            The reason: the errors of the ranks that had one, as text; the same on every rank.

        Raises:
            FreezeError: A rank could not undo its part, or a collective has failed; on every rank that can still be reached.
        """
        if self.broken:
            raise FreezeError(f"a collective failed half-way: {error}") from error
        if self._committed:
            raise FreezeError(f"after the last vote: {error}") from error
        if not self._heard:
            self._failed_somewhere(failed=True)
        self._on_commit.clear()
        problems: list[str] = []
        while self._undo:
            entry = self._undo.pop()
            if entry.collective:
                self._raise_if_stuck(problems)
            try:
                entry.action()
            except Exception as failure:
                problems.append(f"{entry.name}: {type(failure).__name__}: {failure}")
        self._raise_if_stuck(problems)
        own = "" if isinstance(error, ChangeFailed) else f"{type(error).__name__}: {error}"
        told = self._ranks.gather_objects(own)
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text)

    def _raise_if_stuck(self, problems: list[str]) -> None:
        if not self._failed_somewhere(failed=bool(problems)):
            return
        told = self._ranks.gather_objects("; ".join(problems))
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text)
        raise FreezeError(f"it could not be undone ({listed})")

    def _failed_somewhere(self, *, failed: bool) -> bool:
        try:
            return bool(self._ranks.all_reduce_sum([float(failed)])[0])
        except BaseException:
            self.broken = True
            raise
