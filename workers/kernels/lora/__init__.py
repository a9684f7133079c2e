"""Products with the low-rank weights of many adapters at once."""
