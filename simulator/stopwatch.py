"""The one clock of a replay: CPU time of the core, on a machine that others may use too. Imports nothing of Manta."""

import time


class Stopwatch:
    """Sums up the CPU time of short calls, each of them entered with `with`.

    Each is timed by the wall clock, since a thread's own clock can cost more than the call. What the machine gave to others
    meanwhile is taken out in proportion: CPU time over wall time of the whole thread, between two looks at the sum.
    """

    def __init__(self) -> None:
        self._sum_s = 0.0
        self._inside_s = self._began_s = 0.0
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._inside_s += time.perf_counter() - self._began_s

    def look(self) -> float:
        """Seconds so far. Look now and then, as a proportion is that of the time since the last look."""
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        if wall_s > self._wall_s:
            self._sum_s += self._inside_s * min(1.0, (cpu_s - self._cpu_s) / (wall_s - self._wall_s))
        self._inside_s, self._cpu_s, self._wall_s = 0.0, cpu_s, wall_s
        return self._sum_s
