"""What the store has for a batch, and what this rank could do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .agreement import Way
from .around import Course
from .border import Replay
from .keys import Batch, describe
from .plan import Plan, Rows
from .state import PrefixState
from .store import Found
from .tiers import Tiers

_CLASSES = 256  # classes of batches that are kept


@dataclass
class Kind:
    """What is known of one class of batches."""

    plan: Plan | None = None
    course: Course = field(default_factory=Course)  # of the forwards that skip
    proven: set[bool] = field(default_factory=set)  # composed of several stored batches, or one of them again
    hits: int = 0  # since the last comparison
    off: str = ""


@dataclass(frozen=True)
class Look:
    """What this rank could do with a batch.

    Attributes:
        way: What it could do.
        reason: Why not more, where the batch or the prefix can't be cached.
        is_fault: Whether that is an error of the disk, or of the memory, that holds the rows.
        kind: The class of the batch; None if it has none.
        batch: Its keys.
        back: How many of its rows were stored before.
        rows: Its stored rows, if all are there.
        mixed: Whether they come from several batches.
        carried: The replay at a shallower border, if there is one.
    """

    way: Way
    reason: str = ""
    kind: Kind | None = None
    batch: Batch | None = None
    back: int = 0
    rows: Rows | None = None
    mixed: bool = False
    carried: Replay | None = None
    is_fault: bool = False


class Lookup:
    """Finds the rows of batches.

    Args:
        state: The state of the prefix.
        store: The rows of this host.
        spot_check: One hit in this many is compared.
        reopen: Given a frozen module and its output; returns the output as this package's hooks would leave it.
        shallower: That of a part of this prefix, whose rows are carried to this border.
    """

    def __init__(
        self,
        state: PrefixState,
        store: Tiers,
        *,
        spot_check: int,
        reopen: Callable[[nn.Module, Any], Any],
        shallower: Lookup | None,
    ) -> None:
        self.state, self.shallower = state, shallower
        self._store, self._spot_check, self._reopen = store, spot_check, reopen
        self._kinds: dict[bytes, Kind] = {}
        self.has_hit = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the first class that can be stored; 0 if there is none."""
        return next((kind.plan.row_bytes for kind in self._kinds.values() if kind.plan is not None), 0)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Look:
        """Return what this rank could do with the arguments of a forward."""
        state = self.state.token()
        if self.state.refusal:
            return Look(Way.OFF, self.state.refusal)
        batch = describe(args, kwargs, state)
        if isinstance(batch, str):
            return Look(Way.PLAIN, batch)
        kind = self._kinds.setdefault(batch.kind, Kind())
        if len(self._kinds) > _CLASSES:
            if not self.has_hit:
                return Look(
                    Way.OFF,
                    f"more than {_CLASSES} kinds of batches, and no batch came back in its kind: each combination of shapes (padded to "
                    "the longest row?) and arguments (the number of the batch?) is one",
                )
            self._kinds.pop(next(iter(self._kinds)))
        if kind.off:
            return Look(Way.PLAIN)
        try:
            back, rows, mixed = self._read(kind, batch)
            if rows is None:
                carried = None if self.shallower is None else self.shallower.replay(args, kwargs)
                return Look(Way.STORE if carried is None else Way.CARRY, "", kind, batch, back, carried=carried)
        except OSError as error:
            return Look(Way.OFF, f"its rows can't be read: {error}", is_fault=True)
        way = Way.PROVE if mixed not in kind.proven else Way.SKIP if kind.hits < self._spot_check else Way.CHECK
        return Look(way, "", kind, batch, back, rows, mixed)

    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Replay | None:
        """Return the replay of this batch at this border, if all of its rows are there and proven.

        Raises:
            OSError: Rows can't be read.
        """
        state = self.state.token()
        if self.state.refusal:
            return None
        batch = describe(args, kwargs, state)
        kind = None if isinstance(batch, str) else self._kinds.get(batch.kind)
        if kind is None or kind.plan is None or kind.off or isinstance(batch, str):
            return None
        _, rows, mixed = self._read(kind, batch)
        return None if rows is None or mixed not in kind.proven else Replay(kind.plan, rows.on_device(), self._reopen)

    def _read(self, kind: Kind, batch: Batch) -> tuple[int, Rows | None, bool]:
        """Return how many rows are there; if all are, the rows, and whether they come from several batches."""
        found = self._store.find(batch.keys)
        there = [x for x in found if x is not None]
        if len(there) < len(found) or kind.plan is None:
            return len(there), None, False
        rows = Rows(kind.plan)
        if not self._store.read(there, rows.views()):
            return len(there), None, False
        return len(there), rows, not _is_one_batch(there)


def _is_one_batch(found: Sequence[tuple[int, Found]]) -> bool:
    """Whether these rows are one stored batch, complete and in its order."""
    return all(x.source == found[0][1].source and x.place == place for place, (_, x) in enumerate(found))
