"""The doors: DeepSpeed, torch, the Hugging Face Trainer and Accelerate."""
