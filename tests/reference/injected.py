"""Errors at chosen points of a transaction: between its steps, and at each line within them."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from helpers import ROOT

from smartfrz_ds.backends import transaction
from smartfrz_ds.backends.transaction import Transaction

PACKAGE = f"{ROOT}/smartfrz_ds/"
OUTSIDE = (transaction.__file__, f"{PACKAGE}distributed/")


class Injected(Exception):
    """The error that a test raises."""


class Injector:
    """Numbers the points that a rank passes in a change, and raises at one of them.

    Of each step: when it begins, and when its work is done. Of each exchange: before its first vote, within it (as its local errors must
    be told: `fail_later`), in each copy for it, and after its second vote. And before the last vote.

    Args:
        lines: Whether each line that runs within a step, of this package, is a point too: in its first and its second run.
    """

    def __init__(self, *, lines: bool = False) -> None:
        self._lines = lines
        self._hits: Counter[str] = Counter()
        self._at: int | None = None
        self.passed: list[str] = []

    def arm(self, number: int | None) -> None:
        """Raise at the point of this number in the next change; None: nowhere."""
        self._at = number
        self._hits.clear()
        self.passed.clear()

    def _is_here(self, name: str) -> bool:
        self.passed.append(name)
        return len(self.passed) - 1 == self._at

    def _pass(self, name: str) -> None:
        if self._is_here(name):
            raise Injected(name)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, all transactions have these points."""
        own_step, own_exchange, own_finish = Transaction.step, Transaction.exchange, Transaction.finish

        @contextlib.contextmanager
        def step(tx: Transaction, name: str, undo: Any = None) -> Iterator[None]:
            with own_step(tx, name, undo):
                self._pass(f"{name}: begins")
                with self._traced(name):
                    yield
                self._pass(f"{name}: done")

        @contextlib.contextmanager
        def exchange(tx: Transaction, name: str, undo: Any = None, *, alone: bool = False) -> Iterator[None]:
            self._pass(f"{name}: before the vote")
            with own_exchange(tx, name, undo, alone=alone):
                if self._is_here(f"{name}: within"):
                    tx.fail_later(Injected(f"{name}: within"))
                with self._copies(name):
                    yield
            self._pass(f"{name}: exchanged")

        def finish(tx: Transaction) -> None:
            self._pass("the last vote")
            own_finish(tx)

        Transaction.step, Transaction.exchange, Transaction.finish = step, exchange, finish  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Transaction.step, Transaction.exchange, Transaction.finish = own_step, own_exchange, own_finish  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _copies(self, name: str) -> Iterator[None]:
        """Within it, each copy that this rank makes for an exchange of flat partitions is a point."""
        if "deepspeed" not in sys.modules:
            yield
            return
        from smartfrz_ds.backends.deepspeed.flat.state_moves import HostLink

        own_copy = HostLink.copy

        def copy(link: HostLink, target: Any, source: Any) -> None:
            self._pass(f"{name}: copy")
            own_copy(link, target, source)

        HostLink.copy = copy  # type: ignore[method-assign]
        try:
            yield
        finally:
            HostLink.copy = own_copy  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _traced(self, name: str) -> Iterator[None]:
        frame: Any = sys._getframe()
        while not frame.f_code.co_filename.startswith(PACKAGE):  # the one whose `with` this is
            frame = frame.f_back
        if not self._lines or frame.f_trace is not None:
            yield
            return
        tracer = self._tracer(name)
        before, collecting = sys.gettrace(), gc.isenabled()
        # The collector may run `__del__` of a controller of an earlier test: its lines would be points, and Python swallows what it raises.
        gc.disable()
        frame.f_trace = tracer
        sys.settrace(tracer)
        try:
            yield
        finally:
            sys.settrace(before)
            frame.f_trace = None
            if collecting:
                gc.enable()

    def _tracer(self, name: str) -> Callable[[FrameType, str, Any], Any]:
        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            file = frame.f_code.co_filename
            if not file.startswith(PACKAGE) or file.startswith(OUTSIDE):
                return None
            if event == "line":
                where = f"{name}: {file.removeprefix(PACKAGE)}:{frame.f_lineno}"
                self._hits[where] += 1
                if self._hits[where] <= 2:
                    self._pass(f"{where} ({self._hits[where]})")
            return trace

        return trace
