"""The scheduler without workers: what its events cost, and the tables of replays."""
