"""Training runs that are recorded: the material from which the predictor learns."""
