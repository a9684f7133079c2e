"""LoRA adapters: their files, their place beside the weights, and which rows of a step have which."""
