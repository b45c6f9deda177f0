"""The doors: DeepSpeed, torch, the Hugging Face Trainer, Accelerate and PyTorch Lightning."""
