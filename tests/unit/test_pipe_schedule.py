"""The pruned schedule on paper: which instructions are left, and that every send meets its receive in DeepSpeed's order."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from deepspeed.runtime.pipe import schedule
from hypothesis import given
from hypothesis import strategies as st

from smartfrz_ds.backends.pipeline.schedule import FreeBuffer, FreeInput, FrozenForwardPass, PrunedTrainSchedule, RecvConstant


def of(stage: int, stages: int, micro: int, first_active: int) -> list[schedule.PipeInstruction]:
    return [c for commands in PrunedTrainSchedule(micro, stages, stage, first_active).steps() for c in commands]


@given(st.data(), st.integers(1, 6), st.integers(1, 9))
def test_what_is_left(data: st.DataObject, stages: int, micro: int) -> None:
    first = data.draw(st.integers(0, stages - 1))
    for stage in range(stages):
        count = Counter(type(c) for c in of(stage, stages, micro, first))
        assert count[schedule.OptimizerStep] == count[schedule.ReduceTiedGrads] == 1
        if stage < first:
            assert count[FrozenForwardPass] == micro and count[schedule.ForwardPass] == 0
            assert count[schedule.BackwardPass] == count[schedule.SendGrad] == count[schedule.RecvGrad] == count[schedule.ReduceGrads] == 0
            assert count[FreeBuffer] == count[schedule.SendActivation] == micro
        else:
            assert count[schedule.ForwardPass] == count[schedule.BackwardPass] == micro and count[schedule.ReduceGrads] == 1
            assert count[schedule.SendGrad] == (micro if stage > first else 0)
            assert count[RecvConstant] == count[FreeInput] == (micro if stage == first > 0 else 0)


@given(st.data(), st.integers(1, 6), st.integers(1, 9))
def test_every_send_meets_its_receive(data: st.DataObject, stages: int, micro: int) -> None:
    """All stages at once, sends and receives as rendezvous: nobody waits for ever, and buffers are not overwritten before their use."""
    first = data.draw(st.integers(0, stages - 1))
    queues = [deque(of(stage, stages, micro, first)) for stage in range(stages)]
    sends = {schedule.SendActivation: +1, schedule.SendGrad: -1}
    receives = {schedule.RecvActivation: -1, RecvConstant: -1, schedule.RecvGrad: +1}

    def partner(stage: int) -> int | None:
        kind = type(queues[stage][0])
        return stage + {**sends, **receives}[kind] if kind in sends or kind in receives else None

    while any(queues):
        moved = False
        for stage in range(stages):
            while queues[stage] and partner(stage) is None:
                queues[stage].popleft()
                moved = True
        for stage in range(stages):
            other = partner(stage) if queues[stage] else None
            if other is not None and queues[other] and partner(other) == stage and type(queues[stage][0]) in sends:
                assert type(queues[other][0]) in receives
                queues[stage].popleft()
                queues[other].popleft()
                moved = True
        assert moved, [list(q)[:2] for q in queues]


def test_frozen_stages_need_two_buffers() -> None:
    assert [PrunedTrainSchedule(8, 4, stage, 2).num_pipe_buffers() for stage in range(4)] == [2, 2, 2, 2]
    assert [PrunedTrainSchedule(8, 4, stage, 0).num_pipe_buffers() for stage in range(4)] == [4, 3, 2, 2]
    with pytest.raises(AssertionError):
        PrunedTrainSchedule(8, 4, 0, 4)
