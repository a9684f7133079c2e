"""What the scheduler counts. Imports nothing of Manta."""

import msgspec


class Counters(msgspec.Struct, kw_only=True):
    """What happened since the start. Tokens and events, never decreasing.

    requests, prompt_tokens, output_tokens: of everything submitted so far. resumed: sequences that another scheduler, or
    another connection, had begun or had waiting, and those of which a client has come back with tokens that are still known;
    requests and prompt_tokens do not count them again. cached_tokens: prompt
    tokens found in the cache at a sequence's first start. recomputed_tokens: whose KV preemptions threw away. finished:
    sequences that have ended, for whatever reason. given_up: of these, those for which a worker could choose no token.
    refused: requests that were turned away because of the queue. expired: sequences whose deadline passed before they ended.
    skipped: starts before one that had found no room. aged: sequences that waited for `queue_age_s`.
    Of the prompt tokens that first starts did not find in their group, by reason, so that with cached_tokens they sum up to the
    prompt tokens of all that have started (started_tokens): miss_inside_block: beyond the last that a hit can cover whole;
    miss_routed: another group has them; miss_evicted: were published and have been evicted since; miss_cold: the rest.
    part_tokens: of cached_tokens, those that were found inside a block. parts_copied, parts_taken: how often such a block was
    copied, and taken over from nobody; restarts count too. fetches, fetched_tokens: transfers that brought a prefix from
    another group, and its tokens; loads, loaded_tokens: the same from host memory; offloaded_tokens: copied there;
    failed_transfers: those that did not arrive. migrations: running sequences that went on elsewhere with their blocks.
    routed_by_prefix, routed_by_load: starts in the group with the longest prefix, and elsewhere because it costs less.
    """

    requests: int = 0
    resumed: int = 0
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
    expired: int = 0
    skipped: int = 0
    aged: int = 0
