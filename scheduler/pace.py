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
