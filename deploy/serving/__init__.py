"""`manta serve`: the endpoint's start, its ports and its proxy."""
