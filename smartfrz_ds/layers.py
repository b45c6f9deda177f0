"""Moved to smartfrz_ds.model.layers; this name is kept for one release."""

from smartfrz_ds.model.layers import Layer, find_layers  # noqa: F401
