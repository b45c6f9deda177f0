"""Everything that a user sees of a run: events, status, the log and the report."""
