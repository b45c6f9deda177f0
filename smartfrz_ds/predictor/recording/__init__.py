"""Recorded training runs, from which the predictor learns."""
