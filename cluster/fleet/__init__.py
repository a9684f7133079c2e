"""The groups of a cluster and its scheduler: started, watched, replaced, added and drained."""
