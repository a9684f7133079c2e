"""How fast something goes, lately. Pure; time is an argument."""

import math


class Pace:
    """An amount per second, averaged over the past with a half-life: what happened that long ago counts half."""

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._decay = math.log(2) / half_life_s
        self._sum = 0.0
        self._since_s = 0.0

    def count(self, amount: float, now_s: float) -> None:
        self._sum = self._sum * math.exp(self._decay * (self._since_s - now_s)) + amount
        self._since_s = now_s

    def per_s(self, now_s: float) -> float:
        return self._sum * math.exp(self._decay * (self._since_s - now_s)) * self._decay


class QueuePace:
    """What leaves a queue in a second, by the time in which somebody waited: hours without a queue say nothing about it."""

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._pace = Pace(half_life_s)
        self._half_life_s = half_life_s
        self._known = False
        self._waited_s = 0.0  # the queue's own time
        self._since_s: float | None = None  # when somebody began to wait

    def begin(self, now_s: float) -> None:
        """Somebody waits. Nothing happens if it was so before."""
        if self._since_s is None:
            self._since_s = now_s

    def end(self, now_s: float) -> None:
        """Nobody waits any more."""
        self._waited_s, self._since_s = self._time_s(now_s), None

    def count(self, amount: float, now_s: float) -> None:
        """So much has waited, some time at least, and does no more."""
        self._known = True
        self._pace.count(amount, self._time_s(now_s))

    def per_s(self, now_s: float) -> float | None:
        """None before anything has left. The time before that does not count as one in which nothing did."""
        time_s = self._time_s(now_s)
        return self._pace.per_s(time_s) / (1.0 - 0.5 ** (time_s / self._half_life_s)) if self._known else None

    def _time_s(self, now_s: float) -> float:
        return self._waited_s + (0.0 if self._since_s is None else now_s - self._since_s)
