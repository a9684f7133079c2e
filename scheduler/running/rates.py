"""How fast prompts are computed and blocks move, as the workers report it. Pure; no clock."""

FETCH_PRIOR = 0.1
"""Time to fetch a token, in times to compute one, until both are measured: what a network of 25 GB/s and a large model have."""

LOAD_PRIOR = 0.05
"""The same of host memory."""

SMOOTHING = 0.1
"""Weight of the newest measurement."""

LEAST_TOKENS = 64
"""A step or a transfer of fewer says more of latency than of a rate."""


class Rate:
    """Seconds a token, averaged over the cluster; 0: not measured yet."""

    def __init__(self) -> None:
        self.token_s = 0.0

    def measured(self, tokens: int, elapsed_s: float) -> None:
        if tokens >= LEAST_TOKENS and elapsed_s > 0:
            newest = elapsed_s / tokens
            self.token_s = self.token_s + SMOOTHING * (newest - self.token_s) if self.token_s else newest


class Rates:
    """compute: steps, most of whose tokens are of prompts. fetch, load: blocks from other groups, and from host memory."""

    def __init__(self) -> None:
        self.compute = Rate()
        self.fetch = Rate()
        self.load = Rate()

    @property
    def fetch_cost(self) -> float:
        """What fetching a token takes, in times to compute one."""
        return self._cost(self.fetch, FETCH_PRIOR)

    @property
    def load_cost(self) -> float:
        """What loading a token from host memory takes, in times to compute one."""
        return self._cost(self.load, LOAD_PRIOR)

    def _cost(self, rate: Rate, prior: float) -> float:
        return rate.token_s / self.compute.token_s if rate.token_s and self.compute.token_s else prior
