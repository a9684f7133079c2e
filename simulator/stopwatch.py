"""The one clock of a replay: CPU time of the core, on a machine that others may use too. Imports nothing of Manta."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Sums up the CPU time of short calls.

    Each is timed by the wall clock, since a thread's own clock can cost more than the call. What the machine gave to others
    meanwhile is taken out in proportion: CPU time over wall time of the whole thread, between two looks at the sum.
    """

    def __init__(self) -> None:
        self._sum_s = 0.0
        self._inside_s = 0.0
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._inside_s += time.perf_counter() - began_s

    def look(self) -> float:
        """Seconds so far. Look now and then, as a proportion is that of the time since the last look."""
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        if wall_s > self._wall_s:
            self._sum_s += self._inside_s * min(1.0, (cpu_s - self._cpu_s) / (wall_s - self._wall_s))
        self._inside_s, self._cpu_s, self._wall_s = 0.0, cpu_s, wall_s
        return self._sum_s
