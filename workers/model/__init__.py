"""The decoder: what a checkpoint says, its weights, its layers."""
