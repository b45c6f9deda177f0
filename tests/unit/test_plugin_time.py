"""The meter of the plugin's own time: nested sections, an asynchronous device, and what a step under a GradScaler reads."""

from __future__ import annotations

import pytest
import torch
from reference.oracle import INPUTS, Net

import smartfrz_ds
from smartfrz_ds.bench.overhead.counting import counting
from smartfrz_ds.model import hooks
from smartfrz_ds.model.hooks import ModuleHook, PluginTime


class Clock:
    """Host time that passes only when told, and a device that works through its queue meanwhile. In seconds."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)

    def event(self) -> Event:
        return Event(self)


class Event:
    """The methods of torch.Event that the meter uses."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self) -> None:
        self.done = max(self.clock.now, self.clock.busy_until)

    def query(self) -> bool:
        return self.clock.now >= self.done

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.done - self.done)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(hooks, "perf_counter", lambda: made.now)
    return made


def test_the_outermost_section_counts(clock: Clock) -> None:
    time = PluginTime()

    def work(seconds: float) -> None:
        clock.now += seconds

    with time:
        clock.now += 1
        ModuleHook(work, time)(2)
        time.add_change(2)
        assert time.seconds == 3
    clock.now += 10
    ModuleHook(work, time)(1)
    time.add_change(5)
    assert (time.seconds, time.freeze_seconds) == (9, 7)


def test_waiting_for_the_step_is_not_the_plugins_time(clock: Clock) -> None:
    time = PluginTime()
    time.new_event = clock.event
    clock.queue(10)  # the step, as the host runs ahead
    with time.after_step:
        clock.now += 1
        clock.queue(0.5)  # a snapshot
        clock.wait()
        clock.now += 0.25
    assert time.seconds == 0.75, "what the snapshot adds behind the step; the host's first second was hidden behind it"


def test_work_that_waits_for_nothing_counts_as_host_time(clock: Clock) -> None:
    time = PluginTime()
    time.new_event = clock.event
    clock.queue(10)
    with time.after_step:
        clock.now += 1
    clock.now += 20
    assert time.seconds == 1


def test_kernels_that_the_device_has_not_finished_are_settled_later(clock: Clock) -> None:
    time = PluginTime()
    time.new_event = clock.event
    clock.queue(2)
    with time.after_step:
        clock.wait()
        clock.now += 1
        clock.queue(4)  # without waiting for it
    assert time.seconds == 3, "so far, the host time"
    clock.wait()
    assert time.seconds == 3, "the device took longer than the host, whose time counts then"


def test_no_forward_reads_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Background: GradScaler.get_scale() in each forward, and once for each sampled parameter, waited for the device."""
    model = Net()
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    section = {"policy": "autofreeze", "freeze_interval": 100, "warmup_steps": 0, "snapshot_interval": 50, "total_steps": 1000}
    controller = smartfrz_ds.attach_torch(model, optimizer, section, scaler=scaler)
    for step in range(6):
        with counting() as seen:
            scaler.scale(model(torch.ones(2, INPUTS)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert not seen.reads, (step, seen.reads)
    assert controller.step == 6 and seen.calls["gradients.py:_add"] > 0
    monkeypatch.delattr(type(scaler), "_get_scale_async")
    with pytest.raises(ValueError, match="GradScaler, which has no attribute _get_scale_async"):
        controller.backend.use_scaler(scaler)
    controller.detach()
