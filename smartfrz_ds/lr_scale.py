"""Moved to smartfrz_ds.signals.lr_scale; this name is kept for one release."""

from smartfrz_ds.signals.lr_scale import layer_groups  # noqa: F401
