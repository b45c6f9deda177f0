"""Pipelines: the schedule, tied weights, and moving layers between stages."""
