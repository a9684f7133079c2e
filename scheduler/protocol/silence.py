"""How long others have said nothing, as one who listens in turns can tell. Pure; time is an argument.

Whoever listens may itself have been stopped, or kept from the processor: then what the others have said waits unread, and their
silence is its own. So the time between two looks counts only as far as looks are that far apart as a rule.
"""

import threading

BEAT_S = 0.5
"""How often everybody says that it lives."""

LOOK_S = 0.25
"""How often one looks."""


class Silence:
    """Those who are listened to, by name. `heard` may be called from any thread, `look` from one.

    look_s: how far apart looks are, as a rule; what goes beyond twice that is counted as a sleep of whoever looks.
    """

    def __init__(self, now_s: float, look_s: float = LOOK_S) -> None:
        self._look_s = look_s
        self._looked_s = now_s
        self._heard: dict[int, float] = {}
        self._lock = threading.Lock()

    def heard(self, name: int, now_s: float) -> None:
        """It has said something, or is listened to from now on."""
        with self._lock:
            self._heard[name] = now_s

    def forget(self, name: int) -> None:
        with self._lock:
            self._heard.pop(name, None)

    def look(self, now_s: float) -> dict[int, float]:
        """Seconds for which each has said nothing."""
        with self._lock:
            slept_s = now_s - self._looked_s - self._look_s
            self._looked_s = now_s
            if slept_s > self._look_s:
                self._heard = {name: min(now_s, heard_s + slept_s) for name, heard_s in self._heard.items()}
            return {name: now_s - heard_s for name, heard_s in self._heard.items()}
