"""FSDP2, FSDP1, DDP and one process, without DeepSpeed."""
