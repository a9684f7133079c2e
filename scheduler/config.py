"""What the core is told at its start, and what it counts. Imports nothing of Manta."""

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """page_size in tokens, a power of two from 16 up. max_model_len: prompt and output tokens of one sequence at most.

    grant_ahead: free slots (tokens) at which a lease is extended, about two report intervals.
    prefix_caching: publish pages and reuse them. wait_for_prefix: a sequence whose next page a running one is about to
    compute waits for it instead of computing it too. seed: draws the seeds of requests that bring none; None: anew each time.
    """

    page_size: int = 256
    max_model_len: int = 1 << 20
    grant_ahead: int = 4
    prefix_caching: bool = True
    wait_for_prefix: bool = True
    seed: int | None = 0


class Counters(msgspec.Struct, kw_only=True):
    """What happened since the start. Tokens and events, never decreasing.

    requests, prompt_tokens, output_tokens: of everything submitted so far. cached_tokens: prompt tokens found in the cache at a
    sequence's first start. recomputed_tokens: whose KV preemptions threw away. finished: sequences that have ended, for
    whatever reason.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    finished: int = 0
