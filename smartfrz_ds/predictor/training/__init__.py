"""Everything that makes default.safetensors out of recorded runs, and measures it."""
