"""Moved to smartfrz_ds.distributed.failures; this name is kept for one release."""

from smartfrz_ds.distributed.failures import explained  # noqa: F401
