"""The 1F1B schedule of a pipeline whose front is frozen: DeepSpeed's own, without what no longer has a use.

A stage whose layers are all frozen, with nothing active in front of it, runs forward without a graph, sends, and lets go of its buffers.
The first active stage computes no gradient of its input and sends none. Sends and receives fall away in pairs, within the same step of both
schedules, so the order of the rest is DeepSpeed's and nothing can wait for ever. Every stage keeps its OptimizerStep: it counts steps,
drives the learning rate, and all stages meet in it.

Touched in DeepSpeed 0.19.8:
  runtime/pipe/schedule.py  TrainSchedule.steps, num_pipe_buffers
  runtime/pipe/engine.py    pipe_buffers, _exec_forward_pass, _exec_recv_activations, _INSTRUCTION_MAP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.schedule import PipeInstruction, TrainSchedule


class FrozenForwardPass(schedule.BufferOpInstruction):  # type: ignore[misc]
    """A forward without a graph."""


class FreeBuffer(schedule.BufferOpInstruction):  # type: ignore[misc]
    """Let go of what a buffer holds."""


class FreeInput(schedule.BufferOpInstruction):  # type: ignore[misc]
    """Let go of a buffer's input: no gradient of it will be sent, which is where DeepSpeed frees it."""


class RecvConstant(schedule.BufferOpInstruction):  # type: ignore[misc]
    """Receive activations of which no gradient is wanted."""


class PrunedTrainSchedule(TrainSchedule):  # type: ignore[misc]
    """first_active: the stage that holds the first active layer; those in front of it are wholly frozen. 0: nothing is pruned.
    reduces: whether a frozen stage still runs ReduceGrads, as a wrapper with a placeholder needs for its step (a few zeros).
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, first_active: int, *, reduces: bool = False) -> None:
        super().__init__(micro_batches=micro_batches, stages=stages, stage_id=stage_id)
        assert 0 <= first_active < stages, first_active
        self.first_active, self._reduces = first_active, reduces

    @property
    def is_frozen(self) -> bool:
        """Whether this stage is wholly frozen, with nothing active in front."""
        return self.stage_id < self.first_active

    def num_pipe_buffers(self) -> int:
        """A frozen stage holds the micro-batch that it computes and the one that it sends."""
        return 2 if self.is_frozen else super().num_pipe_buffers()

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for commands in super().steps():
            yield [new for command in commands for new in self._instead_of(command)]

    def _instead_of(self, command: PipeInstruction) -> list[PipeInstruction]:
        kind, buffer = type(command), command.kwargs.get("buffer_id")
        if self.is_frozen:
            if kind in (schedule.BackwardPass, schedule.SendGrad, schedule.RecvGrad):
                return []
            if kind is schedule.ReduceGrads and not self._reduces:
                return []
            if kind is schedule.ForwardPass:
                return [FrozenForwardPass(buffer)]
            if kind is schedule.SendActivation:
                return [command, FreeBuffer(buffer)]
        elif self.stage_id == self.first_active and self.stage_id > 0:
            if kind is schedule.SendGrad:
                return []
            if kind is schedule.RecvActivation:
                return [RecvConstant(buffer)]
            if kind is schedule.BackwardPass:
                return [command, FreeInput(buffer)]
        return [command]


def wrap_instruction(engine: Any, kind: type, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let this engine run `wrapper(what it does now)` for an instruction, for a bench that counts."""
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, kind: wrapper(engine._INSTRUCTION_MAP[kind])}


def frozen_forward_pass(engine: Any, buffer_id: int) -> None:
    with torch.no_grad():
        engine._exec_forward_pass(buffer_id)


def free_buffer(engine: Any, buffer_id: int) -> None:
    for held in engine.pipe_buffers.values():
        held[buffer_id] = None


def free_input(engine: Any, buffer_id: int) -> None:
    engine.pipe_buffers["inputs"][buffer_id] = None


def recv_constant(engine: Any, buffer_id: int) -> None:
    engine._exec_recv_activations(buffer_id)
    received = engine.pipe_buffers["inputs"][buffer_id]
    for tensor in received if isinstance(received, tuple) else (received,):
        tensor.requires_grad_(False)
