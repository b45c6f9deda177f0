"""Reads DeepSpeed's model files of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_MODEL_STATES = "*mp_rank_00_model_states.pt"  # DeepSpeed's file with the client_state (runtime/engine.py, _get_ckpt_name)


def read_model_states(folder: Path, pattern: str = _MODEL_STATES) -> list[dict[str, Any]]:
    """Load DeepSpeed's model files of a tag, mapped into memory if their format allows.

    Args:
        folder: The tag's folder.
        pattern: Glob pattern of the file names.

    Returns:
        The contents, in the order of the ranks.

    Raises:
        ValueError: A file cannot be read.
    """
    return [_read(path) for path in _paths(folder, pattern)]


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
