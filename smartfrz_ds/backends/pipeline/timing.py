"""What each entry of a pipeline's list costs, taken from the training itself: forward, backward and optimizer, as they happen.

Forwards are timed by hooks on the entries' modules, and around entries that are functions. A backward is cut at the moments at which the
gradient of each entry's output arrives: between two of them lies the work of one entry. Nothing is run for it, and a step that is timed is
the step that is trained.

Touched in DeepSpeed 0.19.8: runtime/pipe/module.py  forward_funcs, _local_start
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
from torch import Tensor, nn

# What a backward computed in an entry: gradients of weights and of the input, or of one of them.
Computed = Literal["both", "weight", "input"]
Moment: TypeAlias = Any  # seconds, or a torch.cuda.Event
KEPT = 64  # newest micro-batches of which the median counts
ENOUGH = 2  # micro-batches that make a median


class TimedEntry(partial[Any]):
    """An entry that is no module (a function, or a tied module under a function of the user's), with a clock around it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clock, index = self.timed
        if clock._phase:
            clock._at, clock._entered = index, clock._now()
        out = super().__call__(*args, **kwargs)
        clock._ran(index, out)
        return out

    timed: tuple[StageClock, int]


@dataclass
class EntryTimes:
    """Of one entry and one micro-batch. forward: seconds; backward: seconds, by what was computed; kept_bytes: what it keeps for its
    backward; output_bytes: what it hands on. None and missing: not seen yet."""

    forward: float | None = None
    backward: dict[Computed, float] = field(default_factory=dict)
    kept_bytes: int | None = None
    output_bytes: int | None = None


class StageClock:
    """Of the stage that this rank has now.

    device: where the stage computes; on a GPU its own events are read, at the end of a step. That path has not been run.
    The first step of a layout, which is slower than the others, does not count.
    """

    def __init__(self, pipe: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._pipe, self._device, self._cuda = pipe, device, device.type == "cuda"
        self._handles: list[Any] = []
        self._optimizer = [optimizer.register_step_pre_hook(self._update_begins), optimizer.register_step_post_hook(self._update_ends)]
        self._updates: deque[float] = deque(maxlen=KEPT)
        self._update: list[tuple[Moment, Moment]] = []
        self._began: Moment = None
        self.watch()

    def watch(self) -> None:
        """Begin anew with the entries that this rank holds now; what was seen of others is forgotten."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forward: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._backward: dict[tuple[int, Computed], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._kept: dict[int, int] = {}
        self._output: dict[int, int] = {}
        self._updates.clear()
        self._spans: list[tuple[deque[float], Moment, Moment]] = []  # of the step that is running
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
        """After a freeze or thaw: look once more at what entries keep for their backward."""
        self._to_weigh = True

    def remove(self) -> None:
        """Take all hooks away."""
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
        """Around a forward of one micro-batch. frozen: of a wholly frozen stage, which keeps nothing for a backward."""
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
        """Around a backward of one micro-batch. active: entries with weights that train; input_wanted: whether the gradient of this
        stage's input is computed."""
        self._marks.clear()
        began = self._now()
        yield
        ended = self._now()
        # The rearmost entry's mark comes after the loss, which is counted as its work.
        starts = [began, *(moment for _, moment in self._marks[1:])]
        ends = [*(moment for _, moment in self._marks[1:]), ended]
        for k, ((index, _), start, end) in enumerate(zip(self._marks, starts, ends, strict=True)):
            front = k == len(self._marks) - 1 and not input_wanted
            kind: Computed = "weight" if front else "both" if index in active else "input"
            self._spans.append((self._backward[index, kind], start, end))

    def end_step(self, trained: int) -> None:
        """After a step: what it took counts now. trained: weights of this stage that the optimizer has updated in it."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        if self._warm:
            for values, start, end in self._spans:
                values.append(self._seconds(start, end))
            if self._update and trained:
                self._updates.append(sum(self._seconds(start, end) for start, end in self._update) / trained)
        self._warm = True
        self._spans.clear()
        self._update.clear()

    # --- what was seen --------------------------------------------------------------------------------------------------------------

    def times(self) -> dict[int, EntryTimes]:
        """Medians of the newest micro-batches of each entry that this rank holds."""
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
        """Of the torch optimizer's step, for each weight that it updates; None: not seen yet."""
        return median(self._updates) if self._updates else None

    # --- hooks ----------------------------------------------------------------------------------------------------------------------

    def _enters(self, module: nn.Module, args: Any) -> None:
        if self._phase:
            entries = self._entries[module]
            self._at = entries[min(self._turn[module], len(entries) - 1)]
            self._entered = self._now()

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._phase:  # a recomputation, inside of the backward
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
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Moment, end: Moment) -> float:
        return start.elapsed_time(end) / 1000 if self._cuda else end - start
