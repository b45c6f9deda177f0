"""Whether the cache pays: measured times of the prefix, of keys and of reading, and the hit rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

_FIRST = 6  # measurements before the first judgement
_WINDOW = 200  # forwards after the first row that came back, over which the hit rate is judged
_KEPT = 32  # measurements of each kind


@dataclass
class Gain:
    """Counts and times of one rank. Times in seconds, of one forward.

    Attributes:
        forwards: Forwards that could have been a hit.
        hits: Forwards that skipped the prefix.
        saved: Seconds saved so far.
        carried: Complete forwards that began at a shallower border.
    """

    forwards: int = 0
    hits: int = 0
    saved: float = 0.0
    carried: int = 0
    returned: int = 0  # forwards since a row came back for the first time
    returned_hits: int = 0
    _prefix: list[float] = field(default_factory=list)
    _keys: list[float] = field(default_factory=list)
    _reads: list[float] = field(default_factory=list)
    _writes: list[float] = field(default_factory=list)
    _exchanges: list[float] = field(default_factory=list)
    _steps: list[float] = field(default_factory=list)  # of whole steps without a hit
    _forwards_of_step: int = 0

    def filled(self, *, prefix: float, keys: float, write: float) -> None:
        """Record a forward that ran completely."""
        self.forwards += 1
        self._note(self._prefix, prefix)
        self._note(self._keys, keys)
        self._note(self._writes, write)

    def hit(self, *, keys: float, read: float) -> None:
        """Record a forward that skipped the prefix."""
        self.forwards += 1
        self.hits += 1
        self._note(self._keys, keys)
        self._note(self._reads, read)
        self.saved += (median(self._prefix) if self._prefix else 0.0) - keys - read - self.exchange

    def exchanged(self, seconds: float) -> None:
        """Record an exchange with the other ranks."""
        self._note(self._exchanges, seconds)

    @property
    def exchange(self) -> float:
        """Seconds of an exchange with the other ranks, without waiting for a later rank, for which the forward would wait anyway."""
        return min(self._exchanges, default=0.0)

    def seen(self, rows_back: int, is_hit: bool) -> None:
        """Record how many rows of a batch had been stored before."""
        if rows_back or self.returned:
            self.returned += 1
            self.returned_hits += is_hit

    def step(self, seconds: float, forwards: int) -> None:
        """Record a whole step in which every forward was complete."""
        self._forwards_of_step = forwards
        self._note(self._steps, seconds)

    @property
    def hit_rate(self) -> float:
        """Share of hits among all forwards that could have been one."""
        return self.hits / self.forwards if self.forwards else 0.0

    def predicted(self) -> float | None:
        """Return the predicted factor by which a step in which all forwards hit is faster; None before enough was measured."""
        if min(len(self._prefix), len(self._steps)) < _FIRST:
            return None
        read = median(self._reads or self._writes)
        less = self._forwards_of_step * (median(self._prefix) - median(self._keys) - read - self.exchange)
        whole = median(self._steps)
        return whole / max(whole - less, whole / 100)

    def objection(self, min_gain: float, *, is_full: bool) -> str:
        """Return why the cache does not pay; "" where it does, or where this is not known yet.

        Args:
            min_gain: The setting of that name.
            is_full: Whether a row found no place in the store.
        """
        factor = self.predicted()
        if factor is not None and factor < min_gain:
            return f"a step would be faster by a factor of {factor:.2f} only; smartfrz.cache.min_gain is {min_gain:g}"
        if is_full and not self.returned:
            return "the store is full, and none of its rows came back"
        if factor is not None and self.returned >= _WINDOW:
            rate = self.returned_hits / self.returned
            if 1 + rate * (factor - 1) < 1 + (min_gain - 1) / 2:
                return f"only {rate:.0%} of the forwards found all their rows"
        return ""

    @staticmethod
    def _note(values: list[float], value: float) -> None:
        values.append(value)
        if len(values) > _KEPT:
            del values[0]
