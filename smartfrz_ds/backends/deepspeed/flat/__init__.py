"""Parameter groups in one flat buffer: their layout, what a change of it moves, and what is kept for a thaw."""
