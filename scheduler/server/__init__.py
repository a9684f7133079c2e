"""The process around the core: its sockets, its actor, its counts, and how many groups there should be."""
