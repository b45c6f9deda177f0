"""The cost of this package in a run in which nothing happens: its time and its calls in a step."""
