"""Finds the layers of a model by its structure, or by patterns of names."""
