"""How soon a group that has died is started again. Pure; time is an argument.

A first death is an accident, and its group comes back at once. One that dies again and again waits longer and longer, so that
what kills it does not keep the machine busy; but it is never given up: what has broken may be mended. One that has lived well
in between has been worth its start, and nothing is gained by holding it back: its death is a first one again.
"""

from collections import deque
from dataclasses import dataclass

FIRST_PAUSE_S = 1.0
SPENT_PAUSE_S = 30.0
LONGEST_PAUSE_S = 300.0
LIVED_S = 30.0
"""To have lived well, and at least as long as the start before it took: less than half of the time goes into starts then."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Seconds before the next start. spent: the window's starts are used up: the group rests, and is not expected so long."""

    seconds: float
    spent: bool


class Restarts:
    """most: starts within `window_s` that follow soon."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most, self._window_s = most, window_s
        self._starts: deque[float] = deque()

    def after_death(self, now_s: float, lived_s: float = 0.0, start_s: float = 0.0) -> Pause:
        """The group has died, or could not be started again. lived_s: how long it was up, start_s: how long its start took."""
        if self._most and lived_s >= max(LIVED_S, start_s):
            self._starts.clear()
        while self._starts and self._starts[0] <= now_s - self._window_s:
            self._starts.popleft()
        recent = len(self._starts)
        if recent < self._most:
            pause = Pause(FIRST_PAUSE_S * 2 ** (recent - 1) if recent else 0.0, spent=False)
        else:
            pause = Pause(SPENT_PAUSE_S * 2 ** min(recent - self._most, 8), spent=True)
        seconds = min(pause.seconds, LONGEST_PAUSE_S)
        self._starts.append(now_s + seconds)
        return Pause(seconds, pause.spent)
