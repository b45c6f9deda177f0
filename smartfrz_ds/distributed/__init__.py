"""Collectives with which ranks agree, and what is said when a rank can't go on."""
