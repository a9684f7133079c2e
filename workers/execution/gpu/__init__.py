"""Steps on a GPU: the batch that lives there, and the graphs that are launched over it."""
