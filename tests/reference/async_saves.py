"""Saves of torch.distributed.checkpoint.async_save that last as long as a test wants: slow to be staged, not copied at all, slow to be
written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions

SECONDS = 60.0  # after which a test that forgot its gate fails


class SlowStager(DefaultStager):
    """Copies in a thread of its own, as on a device, once the gate is open."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(
            StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False)
        )
        self._gate = gate

    def _stage(self, state_dict: Any, **kwargs: Any) -> Any:
        assert self._gate.wait(SECONDS)
        return super()._stage(state_dict, **kwargs)


class NoCopy(AsyncStager):
    """Stages nothing: the writer reads the live tensors."""

    _synchronize_after_execute = False

    def stage(self, state_dict: Any) -> Any:
        return state_dict


class SlowWriter(dcp.FileSystemWriter):
    """Writes once the gate is open."""

    def __init__(self, path: Path, gate: threading.Event, error: str = "") -> None:
        super().__init__(path, sync_files=False)
        self._gate, self._error = gate, error

    def write_data(self, plan: Any, planner: Any) -> Any:
        assert self._gate.wait(SECONDS)
        if self._error:
            raise OSError(self._error)
        return super().write_data(plan, planner)


def open_later(gate: threading.Event) -> None:
    """Open the gate in half a second: long after a freeze that does not wait has returned."""
    threading.Timer(0.5, gate.set).start()


def copied(value: Any, *, zeros: bool = False) -> Any:
    """A copy of a state dict, or one of its form to load into."""
    if isinstance(value, dict):
        return {key: copied(item, zeros=zeros) for key, item in value.items()}
    if isinstance(value, Tensor):
        return torch.zeros_like(value) if zeros else value.detach().clone()
    return value


def differing(found: Any, saved: Any, name: str = "") -> list[str]:
    """Names of the tensors that are not bit for bit the same."""
    if isinstance(saved, dict):
        return [text for key, item in saved.items() for text in differing(found[key], item, f"{name}.{key}")]
    inner = (getattr(x, "_local_tensor", x) for x in (found, saved))
    return [name] if isinstance(saved, Tensor) and not torch.equal(*inner) else []
