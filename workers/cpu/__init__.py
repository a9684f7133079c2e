"""What is there for CPUs alone: compiled attention, shared-memory collectives, padding for oneDNN."""
