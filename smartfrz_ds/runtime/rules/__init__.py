"""Which layers may freeze, and when."""
