"""Watches a metric of the run after each freeze, and decides whether the freeze was a mistake.

The metric is smoothed exponentially, from its first value on. The level at the moment of a freeze is that freeze's baseline. If the
smoothed metric rises above `baseline + tolerance * |baseline|`, or is not a number, within `window` steps, the freeze is a mistake.
`Guard` decides, for one process; `GuardedRun` watches a run's steps and passes it the values of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smartfrz_ds.config.sections import GuardSettings
from smartfrz_ds.runtime.run_context import RunContext
from smartfrz_ds.telemetry.metric_feed import MetricFeed

from .protocol import LayoutChange, StepObserver


@dataclass
class Watch:
    """A freeze that is being watched.

    Attributes:
        layers: The layers that it froze.
        step: The step at which it happened.
        baseline: The smoothed metric at that step.
    """

    layers: tuple[str, ...]
    step: int
    baseline: float


@dataclass(frozen=True)
class TakeBack:
    """A decision to undo a freeze.

    Attributes:
        layers: Layers to thaw: those of the mistaken freeze and those frozen after it.
        reason: One short line.
    """

    layers: tuple[str, ...]
    reason: str


class Guard:
    """Decides whether a freeze was a mistake.

    Lower values of the metric are better. `add` takes at most one value per step. While a freeze is watched (`watching`) the values must be
    the same on all ranks; otherwise each rank may add its own and pass the mean of all `level`s as the baseline (smoothing is linear).

    Args:
        tolerance: Relative worsening, > 0 (0.02 is 2 %).
        window: Steps for which a freeze is watched, >= 1.
        smoothing: Weight of the past, in [0, 1): 0 takes each value as it is, 0.9 averages over about 10.
        wait: Number of freezing stages that a layer usually waits, >= 0.
    """

    def __init__(self, *, tolerance: float, window: int, smoothing: float, wait: int) -> None:
        self.tolerance, self.window, self.smoothing, self.wait = tolerance, window, smoothing, wait
        self.level: float | None = None
        self._watches: list[Watch] = []
        self._taken_back: dict[str, int] = {}
        self._waits: dict[str, int] = {}

    @property
    def watching(self) -> bool:
        """Whether a freeze is under watch."""
        return bool(self._watches)

    @property
    def waiting(self) -> frozenset[str]:
        """Layers that no policy may freeze yet."""
        return frozenset(self._waits)

    def add(self, value: float) -> None:
        """Add the metric of one step. While nothing is watched, a value that is not finite is ignored: smoothing would never forget it."""
        if not math.isfinite(value) and not self._watches:
            return
        self.level = value if self.level is None else self.smoothing * self.level + (1 - self.smoothing) * value

    def froze(self, layers: Sequence[str], step: int, baseline: float) -> None:
        """Start watching a freeze.

        Args:
            layers: Its layers.
            step: The current step.
            baseline: The smoothed metric, finite and the same on all ranks. The metric continues from it.
        """
        assert math.isfinite(baseline), baseline
        self.level = baseline
        self._watches.append(Watch(tuple(layers), step, baseline))

    def thawed(self, layers: Collection[str]) -> None:
        """Stop watching layers that were thawed."""
        for watch in self._watches:
            watch.layers = tuple(name for name in watch.layers if name not in layers)
        self._watches = [watch for watch in self._watches if watch.layers]

    def judge(self, step: int) -> TakeBack | None:
        """Decide whether to undo a freeze at this step: the oldest mistaken one, with all later ones that are still watched.

        Watches end after their window. Layers of an undone freeze are no longer watched, and wait `max(wait, 1) * 2^n` freezing stages the
        n-th time. The level returns to the baseline of the mistaken freeze.

        Returns:
            The layers to thaw, or None.
        """
        assert self.level is not None or not self._watches
        mistake = None
        for i, watch in enumerate(self._watches):
            limit = watch.baseline + self.tolerance * abs(watch.baseline)
            if step <= watch.step or self.level is None or self.level <= limit:  # not so for NaN
                continue
            layers = tuple(name for later in self._watches[i:] for name in later.layers)
            reason = (
                f"guard: the smoothed metric is {self.level:.6g}, {step - watch.step} steps after the freeze of step {watch.step}; "
                f"then it was {watch.baseline:.6g}, allowed is {limit:.6g}"
            )
            mistake = TakeBack(layers, reason)
            for name in layers:
                self._taken_back[name] = self._taken_back.get(name, 0) + 1
                self._waits[name] = max(self.wait, 1) * 2 ** self._taken_back[name]
            self._watches, self.level = self._watches[:i], watch.baseline
            break
        self._watches = [watch for watch in self._watches if step - watch.step < self.window]
        return mistake

    def stage_passed(self) -> None:
        """Count a freezing stage: waiting layers have one stage less to wait."""
        self._waits = {name: left - 1 for name, left in self._waits.items() if left > 1}

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, JSON-serializable."""
        return {
            "level": self.level,
            "watches": [asdict(watch) for watch in self._watches],
            "taken_back": dict(self._taken_back),
            "waits": dict(self._waits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the output of `state_dict`."""
        self.level = state["level"]
        self._watches = [Watch(tuple(w["layers"]), int(w["step"]), float(w["baseline"])) for w in state["watches"]]
        self._taken_back, self._waits = dict(state["taken_back"]), dict(state["waits"])


class GuardedRun(StepObserver):
    """A `Guard` with its metric, on all ranks.

    While a freeze is watched, each step costs one reduction of two numbers, whose result the host waits for: the freeze is undone in the
    step that shows the mistake, as every later step would train on with it. Otherwise the values of up to `FOLD` steps wait on the device;
    a freeze costs one reduction.

    Args:
        run: The run.
        settings: The guard's settings.
        take_back: Thaws the layers of a mistaken freeze. Collective.
    """

    FOLD = 64  # maximum number of steps whose losses stay on the device

    def __init__(self, run: RunContext, settings: GuardSettings, take_back: Callable[[TakeBack], None]) -> None:
        self._run, self._settings, self._take_back = run, settings, take_back
        self._warned_blind = False
        self.reset()

    def reset(self) -> None:
        settings, run = self._settings, self._run
        self.guard = Guard(
            tolerance=settings.tolerance, window=run.intervals.guard_window, smoothing=settings.smoothing, wait=run.config.cooldown
        )
        self.feed = MetricFeed(settings.metric)
        self._seen = False  # whether any value came since the last stage

    def on_schedule(self) -> None:
        self.guard.window = self._run.intervals.guard_window

    def record_loss(self, loss: Any) -> None:
        self.feed.loss(loss)

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.feed.tell(metrics)

    def step_skipped(self) -> None:
        self.feed.end_step(applied=False)

    def after_step(self) -> None:
        """Judge, and undo a mistaken freeze. Collective while a freeze is watched."""
        if (mistake := self._judge()) is not None:
            self._take_back(mistake)

    def _judge(self) -> TakeBack | None:
        self.feed.end_step(applied=True)
        if not self.guard.watching:
            if len(self.feed) >= self.FOLD:
                self._fold()
            return None
        value = self._run.ranks.mean(self.feed.take_last())
        if value is not None:
            self._seen = True
            self.guard.add(value)
        return self.guard.judge(self._run.state.step)

    def before_stage(self) -> None:
        """Begin a freezing stage: warn, once, if no value came since the last one."""
        self._fold()
        blind, self._seen = not self._seen, False
        if blind:
            self._warn_blind("since the last freezing stage")

    def stage_passed(self) -> None:
        self.guard.stage_passed()

    def on_layout_change(self, change: LayoutChange) -> None:
        self.guard.thawed(change.back)
        if change.kind == "freeze" and not self._watch(self._run.state.in_order(change.gone)):
            self._warn_blind(f"before the freeze of step {self._run.state.step}, which is not watched therefore")

    def _watch(self, layers: Sequence[str]) -> bool:
        """Start watching a freeze. Collective.

        Returns:
            False if the metric was never seen, so that there is no level to compare with.
        """
        self._fold()
        baseline = self._run.ranks.mean(self.guard.level)
        if baseline is not None:
            self.guard.froze(layers, self._run.state.step, baseline)
        return baseline is not None

    def _warn_blind(self, when: str) -> None:
        if not self._warned_blind:
            self._warned_blind = True
            metric = self._settings.metric
            self._run.journal.warn(
                f"the guard has seen no {metric!r} {when}: it takes engine.backward(loss), or the controller's observe({metric}=…)"
            )

    def sync_for_checkpoint(self) -> None:
        """Set all ranks to the mean of their levels, so that one state can be saved for all. Collective.

        While nothing is watched, each rank smooths its own values. As smoothing is linear, the mean continues like the mean of all values.
        """
        self._fold()
        if not self.guard.watching:
            self.guard.level = self._run.ranks.mean(self.guard.level)
        self._seen = self._run.ranks.all_reduce_sum([float(self._seen)])[0] > 0

    def state_dict(self) -> dict[str, Any]:
        """Return the guard's state, the same on every rank after `sync_for_checkpoint`."""
        return {"guard": self.guard.state_dict() | {"seen": self._seen}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = state.get("guard")
        if own is None:  # of a run without a guard
            return
        self.guard.load_state_dict(own)
        self._seen = bool(own.get("seen", False))
        self.feed = MetricFeed(self.feed.metric)

    def _fold(self) -> None:
        values = self.feed.take()
        self._seen = self._seen or bool(values)
        for value in values:
            self.guard.add(value)
