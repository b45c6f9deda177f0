"""Signals gathered during training for the policies."""
