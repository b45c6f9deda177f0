"""The prefix cache: stored outputs of the frozen prefix, so that a batch seen before skips its forward."""
