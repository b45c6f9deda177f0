"""What a freeze of half of a model holds above the level before: measured, and computed for large clusters."""
