"""Waiting for what must come true."""

import time
from collections.abc import Callable


def until(what: str, true: Callable[[], object], *, patience_s: float = 60.0, every_s: float = 0.005) -> None:
    """what: is said where it takes longer than `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline_s, what
        time.sleep(every_s)
