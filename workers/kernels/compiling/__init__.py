"""Kernels are compiled before they are wanted, each once, by several processes."""
