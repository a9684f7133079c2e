"""Decoders, filled: one class for all native families, and transformers' own classes."""
