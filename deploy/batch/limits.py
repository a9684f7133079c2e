"""How much of a job may be under way. Imports nothing heavy: the command shows what it is unless told."""

from dataclasses import dataclass

from deploy.config.load import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """requests, tokens: under way at once; a request that is larger than that goes alone. retries: of a request that found
    nobody to answer it, before the job gives up. line_bytes: of one input line."""

    requests: int = 512
    tokens: int = 1 << 20
    retries: int = 8
    line_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        lowest = {"--concurrency": (self.requests, 1), "--concurrency-tokens": (self.tokens, 1), "--retries": (self.retries, 0)}
        for option, (value, low) in lowest.items():
            if value < low:
                raise ConfigError(f"{option} {value} is below {low}: raise it")
