"""`smartfrz bench scale`: one process plays one rank of a large cluster, on tensors without storage."""
