"""Where the prefix ends: which tensors leave it, and how its modules are skipped.

A module is skipped around its `__call__`, so that no hook of an engine runs for it. The tensors that leave the prefix are found in one
forward: those outputs of frozen modules whose memory reaches an active module. A frozen module that is skipped returns them from the store
itself, so that whatever keeps the inputs of an active layer (activation checkpointing, for example) keeps the right rows. Everything else
that it returns is NaN.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from smartfrz_ds.model.hooks import ModuleHook

from .around import Course
from .plan import Call, CallDiffers, Leaf, Plan, Rows, SkippedCall, StoredTensor
from .proof import RandomState, same_bits


class Discovery:
    """A complete forward in which the tensors are found that leave the prefix.

    Args:
        rows: Number of rows of the batch.
        later: The modules of all active layers.
        device: The device on which the model runs.

    Attributes:
        course: Told when a layer runs that will be skipped.
    """

    def __init__(self, rows: int, later: Sequence[nn.Module], device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.course = Course()
        self._random = RandomState(device)
        self._calls: list[tuple[nn.Module, TreeSpec, list[Any], list[int]]] = []
        self._origins: dict[int, tuple[int, int]] = {}  # address of a storage -> call and leaf that returned it last
        self._leaving: dict[tuple[int, int], None] = {}
        self._passed = False
        self.reason = ""
        hook = ModuleHook(self._enter)
        self._handles = [m.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for m in later]

    def call(self, module: nn.Module, real: Call, args: Any, kwargs: Any) -> Any:
        """Run a frozen module, and note what it returns."""
        self.course.paused = not self._passed
        try:
            output = real()
        finally:
            self.course.paused = False
        if not self._passed:
            # the output of a frozen layer may require grad, for the active layers behind it: nothing flows behind that
            inputs = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad)
            if any(_storage(x) not in self._origins for x in inputs):
                self.reason = "a gradient flows into the frozen layers: a trained weight is used in front of them"
            leaves, structure = tree_flatten(output)
            number = len(self._calls)
            for at, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    self._origins[_storage(leaf)] = number, at
            self._calls.append((module, structure, leaves, [x._version if isinstance(x, Tensor) else 0 for x in leaves]))
        return output

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._calls:  # an active layer that runs before all frozen ones (text embeddings, then an image tower) gets nothing of them
            return
        if not self._passed:
            self._passed = True
            if not self._random.is_unchanged():
                self.reason = "random numbers are drawn in front of the first active layer (dropout that is left on, or skipped layers)"
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (origin := self._origins.get(_storage(leaf))) is not None:
                self._leaving[origin] = None

    def finish(self) -> tuple[Plan | None, Rows | None]:
        """Return the plan, and the rows of this batch if their memory still holds them. `reason` says why there is no plan."""
        for handle in self._handles:
            handle.remove()
        if not self.reason and not self._passed:
            self.reason = "no active layer ran behind the frozen ones"
        if not self.reason and not self._leaving:
            self.reason = "the first active layer's input is computed from the frozen layers' outputs outside of any layer"
        if self.reason:
            return None, None
        calls: list[SkippedCall] = []
        stored: list[StoredTensor] = []
        sources: list[tuple[Tensor, int]] = []
        for number, (module, structure, leaves, versions) in enumerate(self._calls):
            made = []
            for at, leaf in enumerate(leaves):
                leaves_prefix = (number, at) in self._leaving
                if not isinstance(leaf, Tensor):
                    if not isinstance(leaf, type(None) | bool | int | float | str):
                        self.reason = f"a frozen {type(module).__name__} returns a {type(leaf).__name__}, which can't be stored"
                        return None, None
                    made.append(Leaf("constant", leaf))
                elif type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not torch.strided:
                    self.reason = f"a frozen {type(module).__name__} returns a {type(leaf).__name__}, which can't be stored"
                    return None, None
                elif not leaves_prefix and leaf.is_floating_point():
                    # one element of memory: the outputs of all skipped layers, of all classes, would be too much
                    nan = torch.full((), float("nan"), dtype=leaf.dtype, device=leaf.device)
                    made.append(Leaf("gap", nan.expand(leaf.shape)))
                elif leaf.ndim and leaf.shape[0] == self._rows and not _overlaps(leaf):
                    made.append(Leaf("stored", len(stored)))
                    stored.append(StoredTensor.of(leaf))
                    sources.append((leaf, versions[at]))
                else:
                    made.append(Leaf("shared", leaf.detach().clone()))
            calls.append(SkippedCall(module, structure, tuple(made)))
        if not stored:
            self.reason = "nothing with rows leaves the frozen layers"
            return None, None
        plan = Plan(tuple(calls), tuple(stored))
        if any(leaf._version != version for leaf, version in sources):
            return plan, None  # changed in place since
        rows = Rows(plan)
        for target, (leaf, _) in zip(rows.tensors, sources, strict=True):
            target.copy_(leaf.detach())
        return plan, rows


class Capture:
    """A complete forward whose rows are kept.

    Attributes:
        reason: Why this forward does not follow the plan; "" if it does.
        packing: Seconds of copying.
        passed: time.perf_counter() at the end of the last frozen module in front of the first active one.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan, self._device, self._next = plan, device, 0
        self._random = RandomState(device)
        self.rows = Rows(plan)
        self.reason, self.packing, self.passed = "", 0.0, 0.0

    def call(self, module: nn.Module, real: Call, args: Any, kwargs: Any) -> Any:
        """Run a frozen module, and copy what leaves the prefix."""
        output = real()
        if self._next >= len(self._plan.calls) or self.reason:
            return output
        expected = self._plan.calls[self._next]
        self._next += 1
        if expected.module is not module:
            self.reason = "the model called its frozen layers in another order than before"
        elif expected.stores:
            self._copy(expected, output)
        if self._next == len(self._plan.calls):
            self.passed = perf_counter()
            if not self._random.is_unchanged():
                self.reason = "random numbers are drawn in front of the first active layer (dropout that is left on, or skipped layers)"
        return output

    def _copy(self, expected: SkippedCall, output: Any) -> None:
        began = perf_counter()
        leaves, structure = tree_flatten(output)
        if structure != expected.structure:
            self.reason = f"a frozen {type(expected.module).__name__} returned something else than before"
            return
        for leaf, known in zip(leaves, expected.leaves, strict=True):
            if known.kind == "stored":
                if StoredTensor.of(leaf) != self._plan.stored[known.value]:
                    name = type(expected.module).__name__
                    self.reason = f"a frozen {name} returned another shape or memory format than before for inputs of the same shapes"
                    return
                self.rows.tensors[known.value].copy_(leaf.detach())
            elif known.kind == "shared" and not same_bits(leaf, known.value):
                self.reason = (
                    f"a tensor of shape {tuple(known.value.shape)} leaves the frozen layers that has no row for each row of the batch, and "
                    "differs between batches"
                )
                return
        self.packing += perf_counter() - began

    @property
    def complete(self) -> bool:
        """Whether all calls of the plan came."""
        return not self.reason and self._next == len(self._plan.calls)


class Replay:
    """A forward without the frozen layers.

    Args:
        plan: The calls.
        tensors: The stored tensors, on the device.
        reopen: Gives the output of the last frozen layer what its hooks of this package would have given it.
    """

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], reopen: Callable[[nn.Module, Any], Any]) -> None:
        self._plan, self._tensors, self._reopen, self._next = plan, tensors, reopen, 0
        self.passed = 0.0

    def call(self, module: nn.Module, real: Call, args: Any, kwargs: Any) -> Any:
        """Return what a frozen module would have returned."""
        if self._next >= len(self._plan.calls):
            return real()
        expected = self._plan.calls[self._next]
        if expected.module is not module:
            raise CallDiffers("the model called its frozen layers in another order than before")
        self._next += 1
        values = [self._value(x) for x in expected.leaves]
        if self._next == len(self._plan.calls):
            self.passed = perf_counter()
        return self._reopen(module, tree_unflatten(values, expected.structure))

    def _value(self, leaf: Leaf) -> Any:
        if leaf.kind == "stored":
            return self._tensors[leaf.value]
        return leaf.value.clone() if leaf.kind == "shared" else leaf.value  # a layer may write into it

    @property
    def complete(self) -> bool:
        """Whether all calls of the plan came."""
        return self._next == len(self._plan.calls)


class Carried:
    """A forward that is recorded behind a replay of a shallower border: the rows of the deeper one are computed from stored rows."""

    def __init__(self, outer: Discovery | Capture, inner: Replay) -> None:
        self._outer, self._inner = outer, inner

    def call(self, module: nn.Module, real: Call, args: Any, kwargs: Any) -> Any:
        """Run a frozen module, or return what it would have returned, and record it."""
        return self._outer.call(module, partial(self._inner.call, module, real, args, kwargs), args, kwargs)


class Scope:
    """The forward that is going on: calls of frozen modules from other threads, or outside of it, are not part of it."""

    def __init__(self, forward: Discovery | Capture | Replay | Carried) -> None:
        self.forward, self._thread = forward, threading.get_ident()

    def is_here(self) -> bool:
        """Whether the caller belongs to the forward."""
        return threading.get_ident() == self._thread


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
