"""The benchmarks of `smartfrz bench`, also usable from Python. They measure real engines."""
