"""The settings of a run: the "smartfrz" section of a DeepSpeed JSON."""
