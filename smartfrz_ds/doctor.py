"""Moved to smartfrz_ds.cli.doctor; this name is kept for one release."""

from smartfrz_ds.cli.doctor import examine  # noqa: F401
