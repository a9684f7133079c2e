"""Attention over blocks: of decodes, cut into pieces by a plan, and of chunks, in tiles."""
