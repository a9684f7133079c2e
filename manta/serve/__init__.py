"""Beside `ray.serve`: what stands in for its LLM module."""
