"""Prefixes in the making: what those who run are about to compute is waited for, what they have computed of it is shown.

Requests that share a new prefix and arrive together would each compute it, as would the choices of one request. Instead the
first computes it and the others wait: for the last full block that they share with it, or for the block in which they part if
they share a good part of that. Then they start, with a hit.

Nobody announces what it will compute; whoever comes looks at who fills the block that it needs next, its *peers*. A running
sequence publishes blocks as they fill. What it has of its present block is published when somebody comes who can use it, so it
costs those nothing that nobody follows. Imports `resident`, `sequence`, `config` and the table.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listing
from itertools import islice
from typing import NamedTuple

from kvcache.hashing import hash_run, salt_seed
from kvcache.ids import GroupId
from kvcache.match import common_prefix
from kvcache.table import BlockTable
from scheduler.config.core import CoreConfig
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence

WORTH_WAITING = 0.5
"""Of a block: so much of one must be in common, and not be computed yet, for a sequence to wait. Less is computed twice in
about the time of a step."""

MOST_TOKENS = 32
"""Of the beginning of a block, by which it is found, where no stride says how many."""

MOST_FILLERS = 16
"""Sequences that fill a block which begins alike, of those that are looked at for one prompt, the newest first."""

WHOLE_PROMPT = 1 << 62
"""More blocks than any prompt has: whoever waits for them waits for the end of the author's prompt."""


class Promise(NamedTuple):
    """What `author` is about to compute: so many full blocks, from the first token on, as somebody else needs them. tokens: of
    those what the other can use. end: where the author has computed them.
    """

    author: Sequence
    blocks: int
    tokens: int
    end: int


class Peer(NamedTuple):
    """Who fills a block that somebody else needs. computed: tokens that stand in its blocks; 0 while its own prefix is on its
    way."""

    author: Sequence
    computed: int


class Prefixes:
    """Which block each sequence with blocks fills, and who waits for it.

    A block is found by the chained hash of its first `stride` tokens, if they are known; otherwise by that of the block
    before, as where it begins with decoded tokens. It is looked up by both, so that either is found; a collision costs a
    comparison. Costs a dictionary entry for each sequence, changed when a block is full, and nothing at any other step.

    waiters: by author, those who wait for it, each with the number of full blocks that it needs. No cycle: only sequences with
    blocks are waited for, and one that gives them up releases its waiters.
    """

    def __init__(self, config: CoreConfig, table: BlockTable, groups: Mapping[GroupId, ResidentGroup]) -> None:
        self.stride = config.stride or min(MOST_TOKENS, config.block_size)
        self.waiters: dict[Sequence, list[tuple[int, Sequence]]] = {}
        self._fillers: dict[int, dict[Sequence, None]] = {}
        self._table = table
        self._groups = groups
        self._block_size = config.block_size
        self._parts = config.stride > 0
        self._waits = config.wait_for_prefix
        self._least = max(1, int(WORTH_WAITING * config.block_size))

    # ---- who fills which block

    def turn_to(self, sequence: Sequence, block: int) -> None:
        """From now on this is the block that `sequence` fills."""
        self._close(sequence)
        start = block * self._block_size
        key = _before(sequence, block)
        if sequence.committed - start >= self.stride:
            key = self._begins(sequence, start, key)
        sequence.open_key = key
        self._fillers.setdefault(key, {})[sequence] = None

    def give_up(self, sequence: Sequence) -> list[Sequence]:
        """It fills none any more. Returns who waited for it."""
        self._close(sequence)
        return self.published(sequence, WHOLE_PROMPT) if sequence in self.waiters else []

    def _close(self, sequence: Sequence) -> None:
        key, sequence.open_key = sequence.open_key, None
        if key is not None:
            fillers = self._fillers[key]
            del fillers[sequence]
            if not fillers:
                del self._fillers[key]

    def peers(self, sequence: Sequence, block: int, reusable: int) -> tuple[list[Peer], Promise | None]:
        """Who fills, as far as is known here, what could be this block of `sequence`, where a hit may cover `reusable` tokens;
        and what it could wait for.

        The tokens before it are the same but for a collision; those in it may differ from the first one on.
        """
        start = block * self._block_size
        if reusable - start < self.stride or not self._fillers:
            return [], None
        before = _before(sequence, block)
        authors = [*self._under(self._begins(sequence, start, before)), *self._under(before)]
        peers = [Peer(author, self._computed(author)) for author in authors]
        return peers, self._promised(sequence, block, reusable, peers) if peers and self._waits else None

    def everyone(self) -> dict[Sequence, int]:
        """The key under which each is found, for the invariants."""
        return {sequence: key for key, fillers in self._fillers.items() for sequence in fillers}

    def _begins(self, sequence: Sequence, start: int, before: int) -> int:
        return hash_run(sequence.buffer[start : start + self.stride].tobytes(), before)

    def _under(self, key: int) -> Iterable[Sequence]:
        return islice(reversed(self._fillers.get(key, {})), MOST_FILLERS)

    # ---- what they are about to compute

    def _promised(self, sequence: Sequence, block: int, reusable: int, peers: Listing[Peer]) -> Promise | None:
        """The most full blocks that a peer has in common with `sequence`, else a good part of its next one, `block`."""
        best: Promise | None = None
        for author, _ in peers:
            blocks, end = block, min(reusable // self._block_size, len(author.hashes))
            while blocks < end and author.hashes[blocks] == sequence.hashes[blocks]:
                blocks += 1
            if blocks > (block if best is None else best.blocks):
                best = Promise(author, blocks, blocks * self._block_size, blocks * self._block_size)
        return best or self._promised_part(sequence, block, reusable, peers)

    def _promised_part(self, sequence: Sequence, block: int, reusable: int, peers: Listing[Peer]) -> Promise | None:
        start = block * self._block_size
        full = start + self._block_size
        if not self._parts or min(full, reusable) - start < self._least:
            return None
        wanted = sequence.buffer[start : min(full, reusable)].tobytes()
        for author, computed in peers:
            filled = min(author.committed, full)
            common = common_prefix(author.buffer[start:filled].tobytes(), wanted)
            if common - max(0, computed - start) >= self._least:
                return Promise(author, block + 1 if filled == full else WHOLE_PROMPT, start + common, filled)
        return None

    def ahead_of(self, promise: Promise) -> int:
        """Tokens that are computed until the promise is kept."""
        author = promise.author
        group = self._group(author)
        if author.lease is None:  # its own prefix is on its way
            return group.coming
        return group.ahead_of(author.row) + max(0, promise.end - group.computed(author.row))

    def wait(self, sequence: Sequence, promise: Promise) -> None:
        self.waiters.setdefault(promise.author, []).append((promise.blocks, sequence))

    def published(self, author: Sequence, blocks: int) -> list[Sequence]:
        """`author`, for whom somebody waits, has computed so many full blocks of its prompt, or its `WHOLE_PROMPT`. Returns who
        waits no longer."""
        waiters = self.waiters.pop(author)
        if left := [waiter for waiter in waiters if waiter[0] > blocks]:
            self.waiters[author] = left
        return [sequence for needed, sequence in waiters if needed <= blocks]

    # ---- what they have computed

    def show(self, sequence: Sequence, block: int, peers: Listing[Peer]) -> None:
        """Publishes what peers have computed so far of this block, the next that `sequence` needs. A match stays valid: nothing
        is taken away."""
        start = block * self._block_size
        begins = start + self.stride
        for author, computed in peers if self._parts else ():
            blocks = author.blocks
            if computed < begins or blocks is None:
                continue
            self._group(author).write_back(author, computed)
            same = author.buffer[start:begins].tobytes() == sequence.buffer[start:begins].tobytes()
            if same and computed - start > blocks.inherited:
                for each in author.tables:
                    self._table.publish_tail(each, author.buffer[start:computed].tobytes())

    def _computed(self, author: Sequence) -> int:
        return self._group(author).computed(author.row) if author.lease is not None else 0

    def _group(self, author: Sequence) -> ResidentGroup:
        assert author.blocks is not None, "only sequences with blocks fill one"
        return self._groups[author.blocks.group]


def _before(sequence: Sequence, block: int) -> int:
    """What the hashes of this block are chained to. Those of the blocks before it are known."""
    return sequence.hashes[block - 1] if block else salt_seed(sequence.salt)
