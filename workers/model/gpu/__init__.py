"""Decoders as a GPU runs them: every step driven by device tensors alone, fused kernels between the products."""
