"""The core of SmartFRZ: decide from the movement of a layer's weights whether it has converged. Needs torch, never DeepSpeed.

Names are loaded on first use, so that code which only needs `constants` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .constants import MIN_SNAPSHOTS

if TYPE_CHECKING:
    from .features import FeatureBatch, FeatureExtractor
    from .model import DEFAULT_PREDICTOR, FreezePredictor, load_predictor, save_predictor
    from .recorder import Recorder, Recording
    from .similarity import linear_cka

_HOMES = {
    "FeatureBatch": "features",
    "FeatureExtractor": "features",
    "DEFAULT_PREDICTOR": "model",
    "FreezePredictor": "model",
    "load_predictor": "model",
    "save_predictor": "model",
    "Recorder": "recorder",
    "Recording": "recorder",
    "linear_cka": "similarity",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DEFAULT_PREDICTOR",
    "MIN_SNAPSHOTS",
    "FeatureBatch",
    "FeatureExtractor",
    "FreezePredictor",
    "Recorder",
    "Recording",
    "linear_cka",
    "load_predictor",
    "save_predictor",
]
