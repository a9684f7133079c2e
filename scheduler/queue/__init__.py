"""Who waits, in which order, how many may, and until when."""
