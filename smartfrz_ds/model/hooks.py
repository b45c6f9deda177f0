"""Hooks on modules that become inactive when the model is copied or pickled, and the time that this package takes."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch


class PluginTime:
    """Seconds that this package takes on this rank: its hooks in forward and backward, its work before and after a step, changes.

    Host time, of the outermost section if sections are nested. On an asynchronous device the work after a step may wait for the device,
    which first has to finish the step itself: that wait is not this package's. Two device events, one at the beginning and one at the end
    of the work, tell how long the device took from the end of the step to the end of the work. The smaller of this and the host time
    counts. The events are read later, when they are complete, so nothing waits for them.

    Attributes:
        freeze_seconds: Seconds in freezes, thaws and moves of layers.
        began: Start of the work after the current step (time.perf_counter), None outside of it.
        after_step: The section of the work after a step.
        new_event: Creates a device event with timing (`watch_device`); None if the host does the device's work.
    """

    def __init__(self) -> None:
        self._seconds = self.freeze_seconds = 0.0
        self._depth, self._entered = 0, 0.0
        self._open: list[tuple[Any, Any, float]] = []  # the events of work that the device may not have finished, and its host seconds
        self.began: float | None = None
        self.new_event: Callable[[], Any] | None = None
        self.after_step = _AfterStep(self)

    def watch_device(self, device: torch.device) -> None:
        """Leave the device's own work out. device: the device on which the run trains."""
        if device.type != "cpu":
            self.new_event = lambda: torch.Event(device, enable_timing=True)

    @property
    def seconds(self) -> float:
        """Seconds so far, the current section included. Of work whose events the device has not reached yet, the host time."""
        if self._open:
            self._settle()
        return self._seconds + (perf_counter() - self._entered if self._depth else 0.0)

    def __enter__(self) -> None:
        """Begin a section of this package's work."""
        self._depth += 1
        if self._depth == 1:
            self._entered = perf_counter()

    def __exit__(self, *_: object) -> None:
        """End the section that was begun last."""
        self._depth -= 1
        if not self._depth:
            self._seconds += perf_counter() - self._entered

    def add_change(self, seconds: float) -> None:
        """Add the seconds of a freeze, thaw or move. Within a section, its time includes them."""
        self.freeze_seconds += seconds
        if not self._depth:
            self._seconds += seconds

    def mark(self) -> Any:
        """Return a device event behind all work so far; None if the host does the device's work."""
        if self.new_event is None:
            return None
        event = self.new_event()
        event.record()
        return event

    def leave_out_wait(self, start: Any, host: float) -> None:
        """Leave out the time for which the host waited for work in front of `start` in a section that ends here and took `host` seconds."""
        if start.query():  # an event that the device has not reached yet: nothing waited for it
            self._open.append((start, self.mark(), host))
            self._settle()

    def _settle(self) -> None:
        """Take back the host time in which the device was still busy with a step."""
        while self._open and self._open[0][1].query():
            start, end, host = self._open.pop(0)
            self._seconds -= max(0.0, host - start.elapsed_time(end) / 1000)  # in milliseconds


class _AfterStep:
    """The section of the work after a step."""

    def __init__(self, time: PluginTime) -> None:
        self._time, self._start = time, None

    def __enter__(self) -> None:
        time = self._time
        self._start = None if time.new_event is None else time.mark()
        time.__enter__()
        time.began = perf_counter()

    def __exit__(self, *_: object) -> None:
        time = self._time
        assert time.began is not None
        host, time.began = perf_counter() - time.began, None
        time.__exit__()
        if self._start is not None:
            time.leave_out_wait(self._start, host)


class ModuleHook:
    """Calls a function of ours.

    In a pickled or copied model (an EMA, for example) it does nothing, because that model is not being frozen.

    Args:
        function: The function to call; None for none.
        time: Counts the seconds of the calls, if given.
    """

    def __init__(self, function: Callable[..., Any] | None, time: PluginTime | None = None) -> None:
        self._function, self._time = function, time

    def __call__(self, *args: Any) -> Any:
        """Call the function, if there is one."""
        if self._function is None:
            return None
        time = self._time
        if time is None or time._depth or torch.compiler.is_compiling():  # a compiled forward has no place for a clock
            return self._function(*args)
        time._depth, time._entered = 1, perf_counter()  # as `with time`, without its two calls: this runs in every forward
        try:
            return self._function(*args)
        finally:
            time._depth = 0
            time._seconds += perf_counter() - time._entered

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, (None,)
