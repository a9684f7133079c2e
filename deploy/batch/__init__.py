"""The batch job: a file of requests in, a file of results out. `python -m deploy.batch`, or `manta batch`."""
