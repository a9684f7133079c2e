"""One process's half of each request: sent to the scheduler, its deltas turned into text, its end observed."""
