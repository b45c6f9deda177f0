"""The freeze state in checkpoints, and checkpoints for another number of stages."""
