"""Ports for servers that another process starts later: as benchmarks find them."""

from benchmarks.shared.ports import free_ports

__all__ = ["free_ports"]
