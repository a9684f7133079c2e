"""A rank's process: the Ray actor, the life in it, and what it makes before its first step."""
