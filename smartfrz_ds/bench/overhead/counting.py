"""Counts what this package does within a block: calls of its Python functions, values that it reads from tensors, its collectives.

A count does not depend on the machine or on its load. A value that is read from a tensor is a device sync where the tensor is on a GPU.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist

PACKAGE = str(Path(__file__).parents[2])
_OWN_BENCH = str(Path(__file__).parents[1])
# Each makes the host wait for the device: the C methods, and the operators that Python calls by themselves.
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast_object_list")
_LIBRARIES = tuple(f"{Path(module.__file__ or '').parent}/" for module in (torch, threading))  # frames that act for their caller


@dataclass
class Counts:
    """What this package did within a block, on this rank.

    Attributes:
        calls: Calls of its Python functions, by place ("file.py:function").
        reads: Reads of values of tensors, each a device sync on an asynchronous device, by place and method.
        collectives: Collectives of torch.distributed, by place and name.
    """

    calls: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)

    def numbers(self) -> dict[str, int]:
        """Return the sums."""
        return {"calls": self.calls.total(), "reads": self.reads.total(), "collectives": self.collectives.total()}


@contextmanager
def counting() -> Iterator[Counts]:
    """Count within the block, on this thread and on those that begin in it. Not to be nested."""
    counts = Counts()
    with _patched(torch.Tensor, _READS, counts.reads), _patched(dist, _COLLECTIVES, counts.collectives):

        def note(frame: FrameType, event: str, arg: Any) -> None:
            if event == "call" and _is_ours(frame.f_code):
                counts.calls[_place(frame.f_code)] += 1

        threading.setprofile(note)  # threads that begin within the block
        sys.setprofile(note)
        try:
            yield counts
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


@contextmanager
def _patched(owner: Any, names: tuple[str, ...], counter: Counter[str]) -> Iterator[None]:
    """Count the calls of these functions that this package makes."""
    before = {name: getattr(owner, name) for name in names}
    own = {name for name in names if name in vars(owner)}  # the others are inherited
    for name, function in before.items():
        setattr(owner, name, _counted(function, name, counter))
    try:
        yield
    finally:
        for name, function in before.items():
            if name in own:
                setattr(owner, name, function)
            else:
                delattr(owner, name)


def _counted(function: Callable[..., Any], name: str, counter: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        if frame is not None and _is_ours(frame.f_code):
            counter[f"{_place(frame.f_code)} {name}"] += 1
        return function(*args, **kwargs)

    return call


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE) and not code.co_filename.startswith(_OWN_BENCH)


def _place(code: CodeType) -> str:
    return f"{Path(code.co_filename).name}:{code.co_name}"
