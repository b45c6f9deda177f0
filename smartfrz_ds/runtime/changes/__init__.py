"""One change of what trains: prepare, commit, notify; with its memory check, its ranks that act together and its pauses."""
