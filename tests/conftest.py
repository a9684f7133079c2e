"""For all tests: one Ray client may talk to another's cluster on this machine, which Ray's tokens would forbid."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read once, when Ray first connects
