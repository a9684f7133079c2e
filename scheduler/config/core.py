"""What the core is told at its start. Imports nothing of Manta but how a setting is declared."""

from dataclasses import dataclass

from scheduler.config.options import OptionRule, at_least, option

BLOCK_SIZES = OptionRule(lambda size: size >= 16 and not size & (size - 1), "is not a power of two from 16 up: try 256")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How KV is kept and reused: the scheduler and its workers are told the same."""

    block_size: int = option(256, "Tokens in a KV block: a power of two from 16 up.", BLOCK_SIZES)
    enable_prefix_caching: bool = option(True, "Reuse the KV of prompts that begin alike.")
    hash_stride: int = option(
        32,
        "Tokens in common from which a part of a block is reused; 0: whole blocks only. Half a block at most is taken.",
        at_least(0),
    )
    prefix_fetch: bool = option(
        True,
        "Fetch the KV of a prefix from another group where that is faster than computing it.",
        shown="yes, where there are at least two groups",
    )

    @property
    def stride(self) -> int:
        """The hash stride that blocks of this size allow; 0 without prefix caching."""
        return min(self.hash_stride, self.block_size // 2) if self.enable_prefix_caching else 0


@dataclass(frozen=True, kw_only=True)
class CoreConfig(CacheConfig):
    """The scheduler's settings.

    wait_for_prefix: a sequence whose next block a running one is about to compute waits for it instead of computing it too.
    """

    seed: int | None = option(
        None,
        "Draws the seeds of requests that bring none: an integer.",
        OptionRule(lambda seed: 0 <= seed < 2**63, "(--engine-seed) is outside [0, 2^63): choose a value inside"),
        shown="drawn anew each time",
    )
    queue_skip_s: float = option(
        2.0, "Seconds that others may start before the first in the queue while it finds no room.", at_least(0)
    )
    queue_age_s: float = option(
        30.0, "Wait, in seconds, after which a request goes before priorities and fairness.", at_least(0)
    )
    hung_after_s: float = option(
        4.0,
        "Seconds after which a rank that says nothing, or does not end a step of a kind it knows, may count as hung.",
        at_least(1),
    )
    log_decisions: bool = option(False, "Log why each sequence goes where it does: a line each, from the scheduler.")
    check_invariants: bool = option(False, "Check the scheduler's whole state after every event (slow; for debugging).")
    wait_for_prefix: bool = True


@dataclass(frozen=True, kw_only=True)
class QueueBounds:
    """An endpoint's: how much may wait for a group at once, also while none is up yet."""

    max_queued_requests: int = option(4096, "Requests that may wait for a group; further ones get 429.", at_least(1))
    max_queued_tokens: int = option(4 << 20, "Prompt tokens that may wait for a group; further requests get 429.", at_least(1))


@dataclass(frozen=True, slots=True)
class Resolved:
    """What no setting says, known once the checkpoint and the device are (`cluster.resolve`).

    max_model_len: prompt and output tokens of one sequence at most. grant_ahead: tokens before the end of its blocks at which a
    lease is extended, about two report intervals. window: tokens that the layer sees that sees most, the newest included; None:
    all of them. prefill_ahead: where there is a window, tokens of a prompt, beyond those computed, that a lease has blocks for,
    so that no chunk waits for a grant. narrow: where some layers see all, tokens that the widest of the others sees; None:
    there are no others.
    """

    max_model_len: int = 1 << 20
    grant_ahead: int = 4
    window: int | None = None
    prefill_ahead: int = 0
    narrow: int | None = None
