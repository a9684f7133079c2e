"""What stands between products, a row by itself each: norms, sums, SwiGLU, embedding, rounding."""
