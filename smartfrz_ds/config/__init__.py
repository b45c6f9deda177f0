"""Settings of a run: the "smartfrz" section of a DeepSpeed JSON."""

from __future__ import annotations

from .settings import FreezeConfig, digest

__all__ = ["FreezeConfig", "digest"]
