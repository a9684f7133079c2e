"""The models behind an endpoint beside its first, adapters included."""
