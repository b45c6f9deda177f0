"""Other code that reads the engine's memory: saves in the background, processes that share weights, CUDA graphs.

Touched in torch 2.13:
  distributed/checkpoint/_async_thread_executor.py, _async_process_executor.py   execute_save, which async_save calls with what it staged;
                                  wrapped once in a process by a function that remembers the save until it has ended
  multiprocessing/reductions.py   shared_cache: a StorageWeakRef of each storage that was sent to another process
  cuda/graphs.py                  CUDAGraph; make_graphed_callables, which puts a function of this file in the place of a module's forward
  _inductor/cudagraph_trees.py    objects with a CUDAGraph in `graph`, which torch records again when addresses change
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef, shared_cache

from .state_layout import tensors_in

_EXECUTORS = {
    "torch.distributed.checkpoint._async_thread_executor": "_ThreadBasedAsyncCheckpointExecutor",
    "torch.distributed.checkpoint._async_process_executor": "_ProcessBasedAsyncCheckpointExecutor",
}
_SECONDS_OF_SILENCE = 30.0


@dataclass(frozen=True, eq=False)
class _Save:
    """One call of `async_save`.

    Attributes:
        staged: The state dict that it writes, or the future of it.
        upload: The future of the whole save.
    """

    staged: Any
    upload: Future[Any]


_saves: set[_Save] = set()


def watch_saves() -> bool:
    """Remember each `torch.distributed.checkpoint.async_save` of this process from now on.

    Returns:
        False if this version of torch does not have the place at which a save is seen.
    """
    if not torch.distributed.is_available():
        return True
    try:
        for module, name in _EXECUTORS.items():
            executor = getattr(import_module(module), name)
            if not hasattr(executor.execute_save, "watched_by_smartfrz"):
                executor.execute_save = _watched(executor.execute_save)
    except (ImportError, AttributeError):
        return False
    return True


def _watched(execute_save: Callable[..., Future[Any]]) -> Callable[..., Future[Any]]:
    @functools.wraps(execute_save)
    def watched(executor: Any, staging_future_or_state_dict: Any, *args: Any, **kwargs: Any) -> Future[Any]:
        upload = execute_save(executor, staging_future_or_state_dict, *args, **kwargs)
        save = _Save(staging_future_or_state_dict, upload)
        _saves.add(save)
        upload.add_done_callback(lambda _: _saves.discard(save))
        return upload

    watched.watched_by_smartfrz = True  # type: ignore[attr-defined]
    return watched


def wait_for_saves(live: Callable[[], Iterable[Tensor]], say: Callable[[str], None]) -> None:
    """Wait until no save of `async_save` reads live tensors any more.

    That is when they are staged: copied to the host, by default before async_save returns. Where the stager has copied nothing (its state
    dict is on a device, or shares memory with live tensors), it is when the save has ended. Errors of a save are the user's to see.

    Args:
        live: Returns the tensors that a change may touch.
        say: Takes a line of text, where this takes long.
    """
    for save in list(_saves):
        staged = save.staged
        if isinstance(staged, Future):
            _wait(staged, "is being staged", say)
            staged = None if staged.cancelled() or staged.exception() else staged.result()
        if _reads(staged, live):
            _wait(save.upload, "reads the engine's own tensors", say)


def _wait(future: Future[Any], what: str, say: Callable[[str], None]) -> None:
    if not wait_for([future], timeout=_SECONDS_OF_SILENCE).done:
        say(f"waiting for a checkpoint of torch.distributed.checkpoint.async_save that {what}")
        wait_for([future])


def _reads(staged: Any, live: Callable[[], Iterable[Tensor]]) -> bool:
    tensors = list(tensors_in(staged))
    if any(t.device.type != "cpu" for t in tensors):
        return True
    own = {_address(plain) for t in live() for plain in tensors_in(t)} - {0}
    try:
        return any(_address(t) in own for t in tensors)
    except (RuntimeError, NotImplementedError, AttributeError):  # a subclass that doesn't show its memory, such as ShardedTensor
        return True


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def shared(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of those tensors that other processes may see: in shared memory, or sent through torch.multiprocessing."""
    sent = set(shared_cache.values()) if shared_cache else set()
    found = []
    for name, tensor in tensors.items():
        for plain in tensors_in(tensor):
            storage = plain.untyped_storage()
            # storage.py: is_shared() is true of every CUDA storage
            if (storage.device.type == "cpu" and storage.is_shared()) or (sent and StorageWeakRef(storage) in sent):
                found.append(name)
                break
    return found


def graphed_modules(model: nn.Module) -> list[str]:
    """Return the names of modules that torch.cuda.make_graphed_callables has turned into CUDA graphs."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if getattr(module.__dict__.get("forward"), "__module__", "") == "torch.cuda.graphs"
    ]


def count_graphs() -> int:
    """Count the CUDA graphs of this process that torch does not record again by itself when addresses change, as torch.compile does."""
    if not torch.cuda.is_initialized():
        return 0
    graphs, compiled = _graphs()
    return len(graphs - compiled)


def _graphs() -> tuple[set[int], set[int]]:
    """Return the identities of all CUDA graphs, and of those of torch.compile. Torch has no list: all objects are looked through."""
    graphs: set[int] = set()
    compiled: set[int] = set()
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.cuda.CUDAGraph):
            graphs.add(id(thing))
        elif kind.__module__ == "torch._inductor.cudagraph_trees":
            compiled.add(id(getattr(thing, "graph", None)))
    return graphs, compiled
