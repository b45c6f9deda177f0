"""The observers that watch a run step by step, and their protocol."""
