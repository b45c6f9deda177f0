"""The model without an engine: its layers, freezing of its modules, its FLOPs, and the view of a policy."""
