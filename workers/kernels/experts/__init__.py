"""Mixtures of experts: which of them each token goes through, and their products, grouped by expert."""
