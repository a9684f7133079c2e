"""Decoders as transformers defines them: its classes, our attention, our shards of the weights."""
