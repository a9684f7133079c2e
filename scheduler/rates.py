"""How fast prompts are computed and pages move, as the workers report it. Pure; no clock."""

PRIOR_FETCH = 0.1
"""Time to fetch a token, in times to compute one, until both are measured: what a network of 25 GB/s and a large model have."""

SMOOTHING = 0.1
"""Weight of the newest measurement."""

LEAST_TOKENS = 64
"""A step or a transfer of fewer says more of latency than of a rate."""


class Rates:
    """Seconds a token, averaged over the cluster; 0: not measured yet."""

    def __init__(self) -> None:
        self.compute_s = 0.0
        self.fetch_s = 0.0

    def computed(self, tokens: int, elapsed_s: float) -> None:
        """A step computed so many tokens, most of them of prompts."""
        if tokens >= LEAST_TOKENS and elapsed_s > 0:
            self.compute_s = _mixed(self.compute_s, elapsed_s / tokens)

    def fetched(self, tokens: int, elapsed_s: float) -> None:
        """Pages with room for so many tokens have arrived."""
        if tokens >= LEAST_TOKENS and elapsed_s > 0:
            self.fetch_s = _mixed(self.fetch_s, elapsed_s / tokens)

    @property
    def fetch_cost(self) -> float:
        """What fetching a token takes, in times to compute one."""
        return self.fetch_s / self.compute_s if self.fetch_s and self.compute_s else PRIOR_FETCH


def _mixed(average: float, measured: float) -> float:
    return measured if not average else average + SMOOTHING * (measured - average)
