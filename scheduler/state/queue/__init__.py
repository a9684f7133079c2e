"""Who waits, in which order, until when, and for how long yet."""
