"""What a newcomer has in common with those who run: what they have computed of it is shown, what they are about to compute is
waited for.

Requests that share a new prefix and arrive together would each compute it, as would the choices of one request. Instead the
first computes it and the others wait: for the last full block that they share with it, or for the block in which they part if
they share a good part of that. Then they start, with a hit. What is long in coming is not waited for while another group has
little to do (`policy.worth_waiting`).

A running sequence publishes blocks as they fill. What it has of its present block is published when somebody comes who can use
it, so it costs those nothing that nobody follows. Imports `state`, `policy`, `awaited` and the index.
"""

from collections.abc import Sequence as Listing
from typing import NamedTuple

from kvcache.match import Match, common_prefix
from scheduler import policy
from scheduler.queue.awaited import WHOLE_PROMPT
from scheduler.running.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState

WORTH_WAITING = 0.5
"""Of a block: so much of one must be in common, and not be computed yet, for a sequence to wait. Less is computed twice in
about the time of a step."""


class Newcomer(NamedTuple):
    """A waiting sequence, and what is there of its prefix. reusable: tokens that a hit may cover. match: its full blocks.

    peers: who fills, as it seems, the block that it needs next.
    """

    sequence: Sequence
    reusable: int
    match: Match
    peers: Listing[Sequence]


class Promise(NamedTuple):
    """What `author` is about to compute: so many full blocks, from the first token on, as somebody else needs them. tokens: of
    those what the other can use. end: where the author has computed them.
    """

    author: Sequence
    blocks: int
    tokens: int
    end: int


class Sharing:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._block_size = state.config.block_size
        self._stride = state.config.stride
        self._least = max(1, int(WORTH_WAITING * self._block_size))

    def reusable(self, sequence: Sequence) -> int:
        """Tokens that a hit may cover: never the last one, which is always computed; none where the prompt's own
        log-probabilities are wanted."""
        if not self._state.config.enable_prefix_caching or sequence.params.prompt_logprobs is not None:
            return 0
        return sequence.committed - 1

    def look(self, sequence: Sequence) -> Newcomer:
        state, reusable = self._state, self.reusable(sequence)
        limit = reusable // self._block_size
        sequence.hash_up_to(limit, self._block_size)
        match = state.table.match(sequence.tokens, sequence.hashes, sequence.salt, limit)
        return Newcomer(sequence, reusable, match, state.open_blocks.alike(sequence, len(match.nodes), reusable))

    def promised(self, newcomer: Newcomer) -> Promise | None:
        """What is worth to be waited for: the most full blocks that a peer has in common with it, else a part of one."""
        if not (newcomer.peers and self._state.config.wait_for_prefix):
            return None
        promise = self._promised_blocks(newcomer) or self._promised_part(newcomer)
        return promise if promise is not None and self._worth_waiting(promise, newcomer) else None

    def _promised_blocks(self, newcomer: Newcomer) -> Promise | None:
        sequence, reusable, match, peers = newcomer
        known, last = len(match.nodes), reusable // self._block_size
        best: Promise | None = None
        for author in peers:
            blocks, end = known, min(last, len(author.hashes))
            while blocks < end and author.hashes[blocks] == sequence.hashes[blocks]:
                blocks += 1
            if blocks > (known if best is None else best.blocks):
                best = Promise(author, blocks, blocks * self._block_size, blocks * self._block_size)
        return best

    def _promised_part(self, newcomer: Newcomer) -> Promise | None:
        sequence, reusable, match, peers = newcomer
        block = len(match.nodes)
        start = block * self._block_size
        end = min(start + self._block_size, reusable)
        if not self._stride or end - start < self._least:
            return None
        wanted = sequence.buffer[start:end].tobytes()
        for author in peers:
            filled = min(author.committed, start + self._block_size)
            common = common_prefix(author.buffer[start:filled].tobytes(), wanted)
            if common - self._computed_from(author, start) >= self._least:
                whole = start + self._block_size <= author.committed
                return Promise(author, block + 1 if whole else WHOLE_PROMPT, start + common, filled)
        return None

    def _worth_waiting(self, promise: Promise, newcomer: Newcomer) -> bool:
        """Not if much else is computed before it, while another group would begin at once."""
        queued = self._state.columns.least_backlog()
        if queued is None:
            return True
        author, group = promise.author, self._state.group_of(promise.author)
        assert group is not None, "only sequences with blocks are waited for"
        if author.lease is None:  # its own prefix is on its way
            ahead = group.coming
        else:
            ahead = group.ahead_of(author.row) + max(0, promise.end - group.computed(author.row))
        return policy.worth_waiting(ahead, promise.tokens - len(newcomer.match.nodes) * self._block_size, queued)

    def _computed_from(self, author: Sequence, start: int) -> int:
        """Tokens from `start` on that stand in the blocks of its group."""
        group = self._state.group_of(author)
        return max(0, group.computed(author.row) - start) if group is not None and author.lease is not None else 0

    def show(self, newcomer: Newcomer) -> None:
        """Publishes what peers have computed so far of the block that it needs next. Its match stays valid: nothing is taken
        away."""
        sequence, start = newcomer.sequence, len(newcomer.match.nodes) * self._block_size
        for author in newcomer.peers:
            group, computed = self._state.group_of(author), start + self._computed_from(author, start)
            if group is not None and self._stride and computed - start >= self._stride:
                self._show(group, author, sequence, start, computed)

    def _show(self, group: ResidentGroup, author: Sequence, sequence: Sequence, start: int, computed: int) -> None:
        blocks, begins = author.blocks, start + self._stride
        assert blocks is not None
        group.write_back(author, computed)
        same = author.buffer[start:begins].tobytes() == sequence.buffer[start:begins].tobytes()
        if same and computed - start > blocks.inherited:
            self._state.table.publish_tail(blocks, author.buffer[start:computed].tobytes())
