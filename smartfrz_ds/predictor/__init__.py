"""SmartFRZ's core: reads how a layer's weights moved and says whether it has converged. Needs torch only, never DeepSpeed.

Names are loaded when they are first used: whoever needs `constants` alone does without torch.
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
