"""A change that fails: what the caller, the observers, the log and a policy's run see of it, and when nothing can be undone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.ones import step
from reference.oracle import Net

import smartfrz_ds
from smartfrz_ds.errors import ChangeUndone, FreezeError
from smartfrz_ds.runtime.observers.protocol import StepObserver

POLICY = {
    "policy": "linear",
    "linear": {"start_step": 1, "end_step": 9},
    "total_steps": 12,
    "snapshot_interval": 1,
    "freeze_interval": 2,
    "warmup_steps": 2,
    "cooldown": 0,
}


class Told(StepObserver):
    """Notes the changes of which it is told."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def on_layout_change(self, change: Any) -> None:
        self.kinds.append(change.kind)


def attach(**section: Any) -> tuple[Any, Any]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return optimizer, smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "order": "any"} | section)


@pytest.fixture
def run() -> Iterator[tuple[Any, Any]]:
    optimizer, controller = attach()
    yield optimizer, controller
    controller.detach()


def fail(error: BaseException) -> Any:
    def failing(*_: Any) -> None:
        raise error

    return failing


def test_a_change_that_is_undone(run: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets ChangeUndone; no observer is told; the event says why, and of which layers. The next one works."""
    optimizer, controller = run
    step(optimizer)
    told = Told()
    controller._observers.append(told)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ChangeUndone, match=r"rank 0: MemoryError: no room\. The layout is the previous one"),
    ):
        patch.setattr(controller.backend, "verify", fail(MemoryError("no room")))
        controller.freeze(["blocks.0", "embeddings"])
    assert controller.frozen == () and told.kinds == []
    (event,) = controller.report().events
    assert (event.kind, event.step, event.layers, event.frozen) == ("undone", 1, ("embeddings", "blocks.0"), ())
    assert event.message == "freeze failed and was undone on every rank: rank 0: MemoryError: no room"
    lines = [(r.levelno, r.getMessage()) for r in caplog.records if "undone" in r.getMessage()]
    assert lines == [(logging.WARNING, f"smartfrz: step 1: {event.message}; 0 of 7 layers frozen, training goes on")]
    controller.freeze(["blocks.0", "embeddings"])
    assert controller.frozen == ("embeddings", "blocks.0") and told.kinds == ["freeze"]


def test_an_undo_that_fails_ends_the_run(run: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, controller = run
    step(optimizer)
    controller.last_checkpoint = "checkpoints/step4"
    monkeypatch.setattr(controller.backend, "verify", fail(MemoryError("no room")))
    monkeypatch.setattr(controller.backend, "_regroup", fail(ArithmeticError("stuck")))
    told = r"freeze failed at step 1 .* Resume from .*checkpoints/step4: it could not be undone \(rank 0: .*ArithmeticError: stuck\)"
    with pytest.raises(FreezeError, match=told):
        controller.freeze(["blocks.0"])
    assert not controller.report().events


def test_an_interrupt_ends_the_run(run: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks could not be told in time."""
    optimizer, controller = run
    step(optimizer)
    controller.last_checkpoint = "checkpoints/step4"
    monkeypatch.setattr(controller.backend, "verify", fail(KeyboardInterrupt()))
    with pytest.raises(FreezeError, match=r"freeze failed at step 1 after it had started.*checkpoints/step4"):
        controller.freeze(["blocks.0"])


def test_a_policy_whose_freeze_is_undone_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on; each failure is said once; the next stages freeze as if nothing had been."""
    log = tmp_path / "events.jsonl"
    optimizer, controller = attach(**POLICY, log_path=str(log))
    monkeypatch.setattr(controller.backend, "verify", fail(MemoryError("no room")))
    while controller.step < 6:
        step(optimizer)
    assert controller.frozen == ()
    monkeypatch.undo()
    while controller.step < 9:
        step(optimizer)
    controller.detach()
    events = [(e.kind, e.step, e.layers) for e in smartfrz_ds.read_events(log) if e.kind != "decision"]
    undone = [e for e in events if e[0] == "undone"]
    assert [step for _, step, _ in undone] == [2, 4, 6]
    assert next(e for e in events if e[0] == "freeze")[:2] == ("freeze", 8)
    assert controller.report().events[-1].frozen[0] == "embeddings"
    assert len([r for r in caplog.records if "failed and was undone" in r.getMessage()]) == len(undone)
