"""Decoders: what a checkpoint says, its weights, its layers, and who runs them."""
