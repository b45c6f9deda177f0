"""Moved to smartfrz_ds.telemetry.report; this name is kept for one release."""

from smartfrz_ds.telemetry.report import write_report  # noqa: F401
