"""Parameter groups in one flat buffer: their layout, the moves of a change, and the state that is kept for a thaw."""
