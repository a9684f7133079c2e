"""Triton kernels by themselves, each with its reference in torch beside it, and what they take."""
