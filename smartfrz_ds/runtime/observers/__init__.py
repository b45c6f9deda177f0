"""What watches a run step by step: the protocol, and each sense and check behind it."""
