"""Something to look at: the status page with its data, and `manta top`, which shows the same on a terminal."""
