"""Model types beside transformers itself: small random checkpoints, token for token."""
