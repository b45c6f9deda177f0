"""`smartfrz bench policies`: the same tasks, seeds and engine for every policy."""
