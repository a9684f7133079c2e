"""Traces made from a few numbers, for questions that no recorded trace asks: many groups, thousands of requests a second.

Imports NumPy and the form of a trace's requests.
"""

import difflib
from dataclasses import dataclass, fields

import numpy as np

from simulator.traces import TraceError, TraceRequest

SCHEME = "synthetic:"
BLOCK_TOKENS = 64
LENGTH_SHAPE = 2.0
"""Of the gamma distribution of all lengths: most are shorter than the mean, a few are three times as long."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """requests that come at `rate` a second, at random (Poisson). prompt, output: mean tokens.

    shared: the part of a prompt, on average, that its user sends every time, at its beginning. users: how many there are, each
    with a beginning of its own; every request is of one of them, by chance.
    """

    requests: int = 10_000
    rate: float = 100.0
    prompt: int = 1000
    output: int = 250
    shared: float = 0.5
    users: int = 1000

    def __post_init__(self) -> None:
        if min(self.requests, self.prompt, self.output, self.users) < 1 or not self.rate > 0 or not 0 <= self.shared <= 1:
            raise TraceError(f"{self}: shared must be from 0 to 1, the others above 0")


def parse_synthetic(text: str) -> Synthetic:
    """`synthetic:rate=1000,users=50`; what is not given has its default. Errors: TraceError."""
    kinds = {field.name: float if field.type in (float, "float") else int for field in fields(Synthetic)}
    given: dict[str, float] = {}
    for part in filter(None, text.removeprefix(SCHEME).split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1, 0.75)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(kinds)}"
            raise TraceError(f"{text}: a synthetic trace has no {name!r}: {hint}")
        try:
            given[name] = kinds[name](value)
        except ValueError:
            raise TraceError(f"{text}: {name} must be a number, not {value!r}") from None
    return Synthetic(**given)  # type: ignore[arg-type]


def make_trace(numbers: Synthetic, seed: int = 0, limit: int | None = None) -> list[TraceRequest]:
    """Equal seeds give equal traces, and a limit the beginning of the same one."""
    random = np.random.default_rng(seed)
    count = numbers.requests

    def lengths(mean: float, size: int) -> list[int]:
        drawn = random.gamma(LENGTH_SHAPE, mean / LENGTH_SHAPE, size)
        whole: list[int] = np.maximum(1, np.rint(drawn)).astype(np.int64).tolist()
        return whole

    blocks = [round(tokens / BLOCK_TOKENS) for tokens in lengths(numbers.prompt * numbers.shared, numbers.users)]
    beginnings = [np.arange(size, dtype=np.uint64) + np.uint64(user << 24) for user, size in enumerate(blocks, 1)]
    own = lengths(numbers.prompt * (1 - numbers.shared), count)
    output = lengths(numbers.output, count)
    users = random.integers(0, numbers.users, count).tolist()
    arrivals = random.exponential(1 / numbers.rate, count).cumsum()
    arrivals_s: list[float] = (arrivals - arrivals[0]).tolist()
    return [
        TraceRequest(
            at, arrivals_s[at], len(beginnings[user]) * BLOCK_TOKENS + own[at], output[at], beginnings[user], BLOCK_TOKENS
        )
        for at, user in enumerate(users[:limit])
    ]
