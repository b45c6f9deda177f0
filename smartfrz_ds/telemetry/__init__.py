"""What a person gets to see: events, status, the log and the report."""
