"""Products of a few tokens with a large matrix, and what is fused with them."""
