"""Measures the cost of each entry of a pipeline's list during training: forward, backward and optimizer.

Forwards are timed by hooks on the entries' modules, and around entries that are functions. A backward is divided at the moments at which
the gradient of each entry's output arrives: the time between two of them is the work of one entry. No extra computation is run; the timed
steps are the training steps.

Private attributes of DeepSpeed 0.19.8 used here: runtime/pipe/module.py  forward_funcs, _local_start
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal, TypeAlias

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

# The gradients that a backward computed in an entry: of weights and of the input, or of one of them.
Computed = Literal["both", "weight", "input"]
Moment: TypeAlias = Any  # seconds, or an event of the accelerator
KEPT = 64  # number of newest micro-batches over which medians are taken
ENOUGH = 2  # smallest number of micro-batches for a median


class TimedEntry(partial[Any]):
    """A timed entry that is not a module: a function, or a user's function of a tied module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, and time it within a forward."""
        clock, index = self.timed
        if clock._phase:
            clock._at, clock._entered = index, clock._now()
        out = super().__call__(*args, **kwargs)
        clock._ran(index, out)
        return out

    timed: tuple[StageClock, int]


@dataclass
class EntryTimes:
    """Costs of one entry and one micro-batch. None, or a missing key, means not measured yet.

    Attributes:
        forward: Seconds of a forward.
        backward: Seconds of a backward, by the gradients that were computed.
        kept_bytes: Bytes that it keeps for its backward.
        output_bytes: Bytes that it passes to the next entry.
    """

    forward: float | None = None
    backward: dict[Computed, float] = field(default_factory=dict)
    kept_bytes: int | None = None
    output_bytes: int | None = None


@dataclass
class _StepSpans:
    """The times of one step. update: begin and end of the optimizer's work on `trained` weights. ended: the end of the step."""

    spans: list[tuple[deque[float], Moment, Moment]]
    update: list[tuple[Moment, Moment]]
    trained: int
    ended: Moment


class StageClock:
    """Measures the current stage of this rank.

    The first step after a change of the frozen set or of the stages is slower than the others and does not count.

    Args:
        pipe: The PipelineModule.
        optimizer: The stage's torch optimizer.
        device: The stage's device. On an asynchronous one, times are those of device events. They are read in later steps, when they are
            complete, so that nothing waits for them. That path has not been run on a GPU.
    """

    def __init__(self, pipe: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._pipe, self._device = pipe, device
        self._event = get_accelerator().Event  # a class; None on the CPU
        self._handles: list[Any] = []
        self._optimizer = [optimizer.register_step_pre_hook(self._update_begins), optimizer.register_step_post_hook(self._update_ends)]
        self._updates: deque[float] = deque(maxlen=KEPT)
        self._update: list[tuple[Moment, Moment]] = []
        self._began: Moment = None
        self.watch()

    def watch(self) -> None:
        """Start over with the entries that this rank holds at present; earlier measurements are discarded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forward: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._backward: dict[tuple[int, Computed], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._kept: dict[int, int] = {}
        self._output: dict[int, int] = {}
        self._updates.clear()
        self._spans: list[tuple[deque[float], Moment, Moment]] = []  # of the step that is running
        self._unread: deque[_StepSpans] = deque()  # of steps whose events the device may not have reached yet
        self._marks: list[tuple[int, Moment]] = []
        self._phase = ""
        self._warm = False
        self._to_weigh = True
        self._entries: dict[nn.Module, list[int]] = defaultdict(list)
        functions = self._pipe.forward_funcs
        for k, function in enumerate(functions):
            index = self._pipe._local_start + k
            if isinstance(function, nn.Module):
                self._entries[function].append(index)
            else:
                known = function if isinstance(function, partial) else partial(function)
                functions[k] = TimedEntry(known.func, *known.args, **known.keywords)
                functions[k].timed = self, index
        for module in self._entries:
            self._handles.append(module.register_forward_pre_hook(self._enters))
            self._handles.append(module.register_forward_hook(self._leaves))

    def weigh(self) -> None:
        """Measure again how many bytes entries keep for their backward, after a freeze or thaw."""
        self._to_weigh = True

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in (*self._handles, *self._optimizer):
            handle.remove()
        self._handles.clear()
        functions = self._pipe.forward_funcs
        for k, f in enumerate(functions):
            if isinstance(f, TimedEntry):
                functions[k] = partial(f.func, *f.args, **f.keywords) if f.args or f.keywords else f.func

    @property
    def held(self) -> list[int]:
        """The entries of this rank."""
        return list(range(self._pipe._local_start, self._pipe._local_stop))

    # --- around what the engine executes ------------------------------------------------------------------------------------------

    @contextmanager
    def forward(self, *, frozen: bool = False) -> Iterator[None]:
        """Time a forward of one micro-batch, which is the block.

        Args:
            frozen: Whether the stage is entirely frozen, so that it keeps nothing for a backward.
        """
        self._phase, self._turn, self._at = "forward", dict.fromkeys(self._entries, 0), -1
        measures = self._to_weigh and self._warm and not frozen
        try:
            if measures:
                seen: dict[int, dict[int, int]] = defaultdict(dict)
                own = {p.untyped_storage().data_ptr() for p in self._pipe.parameters()}

                def keep(tensor: Tensor) -> Tensor:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in own:
                        seen[self._at][storage.data_ptr()] = storage.nbytes()
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    yield
                self._kept |= {index: sum(storages.values()) for index, storages in seen.items()}
                self._to_weigh = False
            else:
                yield
        finally:
            self._phase = ""

    @contextmanager
    def backward(self, active: Collection[int], input_wanted: bool) -> Iterator[None]:
        """Time a backward of one micro-batch, which is the block.

        Args:
            active: Entries with weights that train.
            input_wanted: Whether the gradient of this stage's input is computed.
        """
        self._marks.clear()
        began = self._now()
        yield
        ended = self._now()
        # The mark of the last entry comes after the loss, which is counted as its work.
        starts = [began, *(moment for _, moment in self._marks[1:])]
        ends = [*(moment for _, moment in self._marks[1:]), ended]
        for k, ((index, _), start, end) in enumerate(zip(self._marks, starts, ends, strict=True)):
            front = k == len(self._marks) - 1 and not input_wanted
            kind: Computed = "weight" if front else "both" if index in active else "input"
            self._spans.append((self._backward[index, kind], start, end))

    def end_step(self, trained: int) -> None:
        """Add the measurements of a step.

        Args:
            trained: Number of weights of this stage that the optimizer updated in it.
        """
        if self._warm:
            self._unread.append(_StepSpans(self._spans, self._update if trained else [], trained, self._now()))
        self._warm = True
        self._spans, self._update = [], []
        self._read()

    def _read(self) -> None:
        """Read the times of the steps that the device has completed."""
        while self._unread and (self._event is None or self._unread[0].ended.query()):
            step = self._unread.popleft()
            for values, start, end in step.spans:
                values.append(self._seconds(start, end))
            if step.update:
                self._updates.append(sum(self._seconds(start, end) for start, end in step.update) / step.trained)

    # --- results -----------------------------------------------------------------------------------------------------------

    def times(self) -> dict[int, EntryTimes]:
        """Return the medians over the newest micro-batches, for each entry that this rank holds."""
        self._read()
        told = {index: EntryTimes(kept_bytes=self._kept.get(index), output_bytes=self._output.get(index)) for index in self.held}
        for index, values in self._forward.items():
            if len(values) >= ENOUGH:
                told[index].forward = median(values)
        for (index, kind), values in self._backward.items():
            if len(values) >= ENOUGH:
                told[index].backward[kind] = median(values)
        return told

    @property
    def update_seconds(self) -> float | None:
        """Seconds of the torch optimizer's step per updated weight; None where not measured yet."""
        return median(self._updates) if self._updates else None

    # --- hooks ----------------------------------------------------------------------------------------------------------------------

    def _enters(self, module: nn.Module, args: Any) -> None:
        if self._phase:
            entries = self._entries[module]
            self._at = entries[min(self._turn[module], len(entries) - 1)]
            self._entered = self._now()

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._phase:  # a recomputation within the backward
            return
        self._turn[module] += 1
        self._ran(self._at, output)

    def _ran(self, index: int, output: Any) -> None:
        if not self._phase:
            return
        self._spans.append((self._forward[index], self._entered, self._now()))
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor):
            self._output[index] = sum(
                x.nbytes for x in (output if isinstance(output, tuple | list) else (output,)) if isinstance(x, Tensor)
            )
            if first.requires_grad:
                first.register_hook(lambda gradient: self._marks.append((index, self._now())))

    def _update_begins(self, *_: Any) -> None:
        self._began = self._now()

    def _update_ends(self, *_: Any) -> None:
        self._update.append((self._began, self._now()))

    def _now(self) -> Moment:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Moment, end: Moment) -> float:
        return start.elapsed_time(end) / 1000 if self._event is not None else end - start
