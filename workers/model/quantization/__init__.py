"""Weights of fewer bits: how checkpoints store them, how they become numbers, and in what form a device keeps them."""
