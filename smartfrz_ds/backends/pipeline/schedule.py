"""The 1F1B schedule of a pipeline with a frozen front: DeepSpeed's schedule without its useless instructions.

A stage with only frozen layers, and nothing active in front of it, runs forward without a graph, sends, and frees its buffers. The first
active stage neither computes nor sends a gradient of its input. Sends and receives are removed in pairs, within the same step of both
schedules, so the order of the remaining ones is DeepSpeed's and no stage can wait indefinitely. Every stage keeps its OptimizerStep, which
counts steps, drives the learning rate and synchronizes all stages.

Private attributes of DeepSpeed 0.19.8 used here:
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
    """Run a forward without a graph."""


class FreeBuffer(schedule.BufferOpInstruction):  # type: ignore[misc]
    """Free a buffer."""


class FreeInput(schedule.BufferOpInstruction):  # type: ignore[misc]
    """Free a buffer's input. DeepSpeed frees it when it sends the gradient, which is not sent here."""


class RecvConstant(schedule.BufferOpInstruction):  # type: ignore[misc]
    """Receive activations that need no gradient."""


class PrunedTrainSchedule(TrainSchedule):  # type: ignore[misc]
    """The schedule of one stage.

    Args:
        micro_batches: Micro-batches per step.
        stages: Number of stages.
        stage_id: This stage.
        first_active: The stage with the first active layer; all stages in front of it are entirely frozen. 0: nothing is removed.
        reduces: Whether a frozen stage still runs ReduceGrads: a wrapper with a placeholder needs it for its step (a few zeros).
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, first_active: int, *, reduces: bool = False) -> None:
        super().__init__(micro_batches=micro_batches, stages=stages, stage_id=stage_id)
        assert 0 <= first_active < stages, first_active
        self.first_active, self._reduces = first_active, reduces

    @property
    def is_frozen(self) -> bool:
        """Whether this stage is entirely frozen, with nothing active in front of it."""
        return self.stage_id < self.first_active

    def num_pipe_buffers(self) -> int:
        """Return the number of buffers: a frozen stage holds only the micro-batch that it computes and the one that it sends."""
        return 2 if self.is_frozen else super().num_pipe_buffers()

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of each step."""
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
    """Wrap an engine's method for one instruction, for a bench that counts.

    Args:
        engine: The PipelineEngine.
        kind: The instruction's class.
        wrapper: Takes the current method and returns the new one.
    """
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, kind: wrapper(engine._INSTRUCTION_MAP[kind])}


def frozen_forward_pass(engine: Any, buffer_id: int) -> None:
    """Carry out FrozenForwardPass."""
    with torch.no_grad():
        engine._exec_forward_pass(buffer_id)


def free_buffer(engine: Any, buffer_id: int) -> None:
    """Carry out FreeBuffer."""
    for held in engine.pipe_buffers.values():
        held[buffer_id] = None


def free_input(engine: Any, buffer_id: int) -> None:
    """Carry out FreeInput."""
    engine.pipe_buffers["inputs"][buffer_id] = None


def recv_constant(engine: Any, buffer_id: int) -> None:
    """Carry out RecvConstant."""
    engine._exec_recv_activations(buffer_id)
    received = engine.pipe_buffers["inputs"][buffer_id]
    for tensor in received if isinstance(received, tuple) else (received,):
        tensor.requires_grad_(False)
