"""Watch a metric of the run after each freeze, and decide when a freeze was a mistake.

The metric is smoothed exponentially, from its first value on. The level at the moment of a freeze is that freeze's baseline. If the
smoothed metric rises above `baseline + tolerance * |baseline|`, or is not a number, within `window` steps, the freeze is a mistake.
`Guard` decides and knows no ranks; `GuardedRun` watches a run's steps and brings it the values of all ranks.
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
    """One freeze under watch. layers: what it froze; step: when, in steps; baseline: the smoothed metric then."""

    layers: tuple[str, ...]
    step: int
    baseline: float


@dataclass(frozen=True)
class TakeBack:
    """layers: to be thawed, the mistaken freeze's and those frozen after it; reason: one short line."""

    layers: tuple[str, ...]
    reason: str


class Guard:
    """Decides when a freeze was a mistake.

    tolerance: relative worsening, > 0 (0.02 is 2 %). window: steps, >= 1. smoothing: the weight of the past in [0, 1): 0 takes each value
    as it is, 0.9 averages over about 10. wait: freezing stages that a layer waits normally, >= 0.

    The metric is one where lower is better. Values go in with `add`, one a step at most, the same on all ranks while a freeze is watched
    (`watching`); before that each rank may add its own, and hand in the mean of the ranks' `level` as the baseline (smoothing is linear).
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
        """Add the metric of one step. While nothing is watched, a value that is not finite is left out: smoothing would never forget it."""
        if not math.isfinite(value) and not self._watches:
            return
        self.level = value if self.level is None else self.smoothing * self.level + (1 - self.smoothing) * value

    def froze(self, layers: Sequence[str], step: int, baseline: float) -> None:
        """Watch this freeze from now on. baseline: finite, the same on all ranks; the smoothed metric continues from it."""
        assert math.isfinite(baseline), baseline
        self.level = baseline
        self._watches.append(Watch(tuple(layers), step, baseline))

    def thawed(self, layers: Collection[str]) -> None:
        """Stop watching layers that were thawed."""
        for watch in self._watches:
            watch.layers = tuple(name for name in watch.layers if name not in layers)
        self._watches = [watch for watch in self._watches if watch.layers]

    def judge(self, step: int) -> TakeBack | None:
        """Return what to take back at this step, if anything: the oldest mistaken freeze, with all later ones that are still watched.

        Watches that have lasted their window end here. The layers that are taken back are dealt with: they are no longer watched, and wait
        `max(wait, 1) * 2^n` freezing stages when they are taken back for the n-th time. The level falls back to the mistake's baseline.
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
        """Count a freezing stage: layers that wait have one less to wait for."""
        self._waits = {name: left - 1 for name, left in self._waits.items() if left > 1}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and names."""
        return {
            "level": self.level,
            "watches": [asdict(watch) for watch in self._watches],
            "taken_back": dict(self._taken_back),
            "waits": dict(self._waits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`."""
        self.level = state["level"]
        self._watches = [Watch(tuple(w["layers"]), int(w["step"]), float(w["baseline"])) for w in state["watches"]]
        self._taken_back, self._waits = dict(state["taken_back"]), dict(state["waits"])


class GuardedRun(StepObserver):
    """A `Guard` with its metric, on all ranks. One reduction of two numbers a step while a freeze is watched, one a freeze.

    settings: of the guard. take_back: thaws the layers of a mistaken freeze. Collective, as the step is.
    """

    FOLD = 64  # steps whose losses may wait on the device

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
        self._seen = False  # any value since the last look

    def on_schedule(self) -> None:
        self.guard.window = self._run.intervals.guard_window

    def record_loss(self, loss: Any) -> None:
        self.feed.loss(loss)

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.feed.tell(metrics)

    def step_skipped(self) -> None:
        self.feed.end_step(applied=False)

    def after_step(self) -> None:
        """Judge, and take a mistaken freeze back. Collective while a freeze is watched."""
        if (mistake := self._judge()) is not None:
            self._take_back(mistake)

    def _judge(self) -> TakeBack | None:
        self.feed.end_step(applied=True)
        if not self.guard.watching:
            if len(self.feed) >= self.FOLD:
                self._fold()
            return None
        values = self.feed.take()
        value = self._mean(values[-1] if values else None)
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
        """Watch a freeze. Collective. Returns False if the metric was never seen: there is no level to compare with."""
        self._fold()
        baseline = self._mean(self.guard.level)
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
        """Bring all ranks to the mean of what they saw, so that one state stands for all. Collective; for a checkpoint.

        Outside of a watch each rank smooths its own values; smoothing is linear, so the mean goes on as the mean of all would.
        """
        self._fold()
        if not self.guard.watching:
            self.guard.level = self._mean(self.guard.level)
        self._seen = self._run.ranks.all_reduce_sum([float(self._seen)])[0] > 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and names; the same on every rank right after `sync_for_checkpoint`."""
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

    def _mean(self, own: float | None) -> float | None:
        """Over the ranks that have a value; None where none has."""
        total, count = self._run.ranks.all_reduce_sum([0.0 if own is None else own, float(own is not None)])
        return total / count if count else None
