"""LoRA adapters: their files, and their places beside the weights."""
