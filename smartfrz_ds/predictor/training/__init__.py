"""Creation of default.safetensors from recorded runs, and its evaluation."""
