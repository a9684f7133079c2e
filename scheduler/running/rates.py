"""How fast prompts are computed and blocks move, as the workers report it. Pure; no clock."""

FETCH_PRIOR = 0.1
"""Time to fetch a token, in times to compute one, until both are measured: what a network of 25 GB/s and a large model have."""

LOAD_PRIOR = 0.05
"""The same of host memory."""

SMOOTHING = 0.1
"""Weight of the newest measurement."""

LEAST_TOKENS = 64
"""A step or a transfer of fewer says more of latency than of a rate."""


class Rates:
    """fetch_cost, load_cost: what fetching a token from another group, and loading it from host memory, takes, in times to
    compute one. All averaged over the cluster."""

    def __init__(self) -> None:
        self.fetch_cost = FETCH_PRIOR
        self.load_cost = LOAD_PRIOR
        self._token_s: dict[str, float] = {}  # what has been measured

    def computed(self, tokens: int, elapsed_s: float) -> None:
        """By a step, most of whose tokens are of prompts."""
        self._measured("compute", tokens, elapsed_s)

    def fetched(self, tokens: int, elapsed_s: float) -> None:
        self._measured("fetch", tokens, elapsed_s)

    def loaded(self, tokens: int, elapsed_s: float) -> None:
        self._measured("load", tokens, elapsed_s)

    def _measured(self, what: str, tokens: int, elapsed_s: float) -> None:
        if tokens < LEAST_TOKENS or elapsed_s <= 0:
            return
        newest, token_s = elapsed_s / tokens, self._token_s
        known = token_s.get(what, newest)
        token_s[what] = known + SMOOTHING * (newest - known)
        if "compute" in token_s and "fetch" in token_s:
            self.fetch_cost = token_s["fetch"] / token_s["compute"]
        if "compute" in token_s and "load" in token_s:
            self.load_cost = token_s["load"] / token_s["compute"]
