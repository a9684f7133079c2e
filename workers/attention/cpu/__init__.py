"""Attention on the CPU: compiled, or plain torch, which also takes layers that differ."""
