"""Measurements of Manta and of its peers; nothing that serves imports this package."""
