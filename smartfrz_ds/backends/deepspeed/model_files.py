"""Reads DeepSpeed's model files of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MODEL_STATES = "*mp_rank_00_model_states.pt"  # DeepSpeed's file with the client_state (runtime/engine.py, _get_ckpt_name)


class ModelStates(Sequence[dict[str, Any]]):
    """DeepSpeed's model files of a tag, in the order of the ranks. Each is loaded when it is asked for, mapped into memory if it can be.

    Args:
        folder: The tag's folder.
        pattern: Glob pattern of the file names.
    """

    def __init__(self, folder: Path, pattern: str = _MODEL_STATES) -> None:
        self._paths = _paths(folder, pattern)
        self._read: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rank: Any) -> Any:
        """Return the content of one file.

        Raises:
            ValueError: It cannot be read.
        """
        if rank not in self._read:
            self._read[rank] = _read(self._paths[rank])
        return self._read[rank]

    def frozen_elements(self, name: str, begin: int, end: int) -> Tensor:
        """Return elements [begin, end) of a frozen weight that ZeRO-3 has cut, from the files of those ranks alone that hold them."""
        first = self[0]["frozen_param_fragments"][name].view(-1)
        size = first.numel()  # the same on every rank, padding of the last one included
        ranks = range(begin // size, -(-end // size))
        if begin == end:
            return first[:0]
        parts = [self[rank]["frozen_param_fragments"][name].view(-1) for rank in ranks]
        return torch.cat(parts)[begin - ranks.start * size : end - ranks.start * size]


def read_client_state(folder: Path) -> dict[str, Any]:
    """Read the first rank's model file: every rank's has the client_state, and under ZeRO-3 there is one of each rank.

    Raises:
        ValueError: It can't be read.
    """
    return _read(_paths(folder, _MODEL_STATES)[0])


def _paths(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda p: [int(x) for x in p.name.split("_") if x.isdigit()])


def _read(path: Path) -> dict[str, Any]:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        except RuntimeError:  # DeepSpeed's checkpoint_serialization: false writes torch's old format, which cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ValueError(f"{path} can't be read: {type(error).__name__}: {error}") from error
