"""Manta on one GPU: its step loop bare, in one process and on Ray, and its endpoint, beside the device's own bounds."""
