"""Collectives with which ranks agree, and the messages when a rank cannot continue."""
