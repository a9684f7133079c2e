"""What the core is told at its start, and what it counts. Imports nothing of Manta."""

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """block_size in tokens, a power of two from 16 up. max_model_len: prompt and output tokens of one sequence at most.

    grant_ahead: free slots (tokens) at which a lease is extended, about two report intervals.
    hash_stride: tokens in common from which a part of a block is reused, at most half a block; 0: only whole blocks are.
    prefix_caching: publish blocks and reuse them. wait_for_prefix: a sequence whose next block a running one is about to
    compute waits for it instead of computing it too. prefix_fetch: a prefix that another group has may be moved instead of
    computed, where the workers can. relieve: who will have to give way for want of blocks is moved to another group, or kept in
    host memory, in time, where that is cheaper than to compute it again. seed: draws the seeds of requests that bring none;
    None: anew each time.
    max_queued_requests, max_queued_tokens: choices, and their prompt tokens, that may wait at once; None: no bound.
    wait_for_groups: requests that come while no group is up wait for one that is expected, instead of being turned away.
    skip_s: so long may others start before the first in the queue, from when it found no room on; 0: never. age_s: whoever has
    waited so long goes before priorities and fairness. log_decisions: a debug line of `scheduler.placement.why` for each start.
    """

    block_size: int = 256
    max_model_len: int = 1 << 20
    grant_ahead: int = 4
    hash_stride: int = 32
    prefix_caching: bool = True
    wait_for_prefix: bool = True
    prefix_fetch: bool = True
    relieve: bool = True
    seed: int | None = 0
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    wait_for_groups: bool = True
    skip_s: float = 2.0
    age_s: float = 30.0
    log_decisions: bool = False

    @property
    def stride(self) -> int:
        """The hash stride that blocks of this size allow; 0 without prefix caching."""
        return min(self.hash_stride, self.block_size // 2) if self.prefix_caching else 0


class Counters(msgspec.Struct, kw_only=True):
    """What happened since the start. Tokens and events, never decreasing.

    requests, prompt_tokens, output_tokens: of everything submitted so far. cached_tokens: prompt tokens found in the cache at a
    sequence's first start. recomputed_tokens: whose KV preemptions threw away. finished: sequences that have ended, for
    whatever reason. given_up: of these, those for which a worker could choose no token. refused: requests that were turned
    away because of the queue. expired: sequences whose deadline passed before they ended. skipped: starts before one that had
    found no room. aged: sequences that waited for `age_s`.
    Of the prompt tokens that first starts did not find in their group, by reason, so that with cached_tokens they sum up to the
    prompt tokens of all that have started (started_tokens): miss_inside_block: beyond the last that a hit can cover whole;
    miss_routed: another group has them; miss_evicted: were published and have been evicted since; miss_cold: the rest.
    part_tokens: of cached_tokens, those that were found inside a block. parts_copied, parts_taken: how often such a block was
    copied, and taken over from nobody; restarts count too. fetches, fetched_tokens: transfers that brought a prefix from
    another group, and its tokens; loads, loaded_tokens: the same from host memory; offloaded_tokens: copied there;
    failed_transfers: those that did not arrive. migrations: running sequences that went on elsewhere with their blocks.
    moved_for_room, kept_for_room: sequences that, as their group was short of blocks, began to move, or were copied to host
    memory while they ran on.
    routed_by_prefix, routed_by_load: starts in the group with the longest prefix, and elsewhere because it costs less.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    finished: int = 0
    given_up: int = 0
    refused: int = 0
    started_tokens: int = 0
    miss_inside_block: int = 0
    miss_routed: int = 0
    miss_evicted: int = 0
    miss_cold: int = 0
    routed_by_prefix: int = 0
    routed_by_load: int = 0
    part_tokens: int = 0
    parts_copied: int = 0
    parts_taken: int = 0
    fetches: int = 0
    fetched_tokens: int = 0
    loads: int = 0
    loaded_tokens: int = 0
    offloaded_tokens: int = 0
    failed_transfers: int = 0
    migrations: int = 0
    moved_for_room: int = 0
    kept_for_room: int = 0
    expired: int = 0
    skipped: int = 0
    aged: int = 0


def count_start(
    counters: Counters, *, block_size: int, prompt_tokens: int, hit_blocks: int, known_blocks: int, evicted_blocks: int,
    candidate_blocks: int, part_tokens: int,
) -> None:  # fmt: skip
    """A sequence's first start: where each token of its prompt comes from, or why it has to be computed.

    candidate_blocks: full blocks that a hit could have covered. Of them, from the first on, known_blocks are held somewhere,
    hit_blocks of those by its group, and evicted_blocks after them were once. part_tokens: found of the block after the hit.
    """
    routed, evicted = known_blocks - hit_blocks, evicted_blocks
    cold = candidate_blocks - known_blocks - evicted_blocks
    inside_block = prompt_tokens - candidate_blocks * block_size
    counters.started_tokens += prompt_tokens
    counters.cached_tokens += hit_blocks * block_size + part_tokens
    counters.part_tokens += part_tokens
    counters.miss_routed += routed * block_size - (part_tokens if routed else 0)
    counters.miss_evicted += evicted * block_size - (part_tokens if evicted and not routed else 0)
    counters.miss_cold += cold * block_size - (part_tokens if cold and not (routed or evicted) else 0)
    counters.miss_inside_block += inside_block - (0 if routed or evicted or cold else part_tokens)
    if hit_blocks and hit_blocks == known_blocks:
        counters.routed_by_prefix += 1
    else:
        counters.routed_by_load += 1
