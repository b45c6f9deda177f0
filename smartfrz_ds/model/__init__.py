"""The model without an engine: its layers, what freezing means for its modules, its FLOPs, and what a policy gets to see."""
