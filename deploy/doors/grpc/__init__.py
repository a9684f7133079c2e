"""Manta's own API: `deploy/proto/manta.proto`, over a server of its own or behind Ray Serve."""
