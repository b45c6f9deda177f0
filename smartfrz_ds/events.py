"""Moved to smartfrz_ds.telemetry.events; this name is kept for one release."""

from smartfrz_ds.telemetry.events import FreezeEvent, RunStart, Status, read_events, read_log  # noqa: F401
