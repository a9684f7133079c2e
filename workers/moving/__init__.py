"""Blocks that move beside the steps: between groups, and to host memory and back."""
