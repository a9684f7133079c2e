"""What a newcomer has in common with those who run: what they have computed of it is shown, what they are about to compute is
waited for.

Requests that share a new prefix and arrive together would each compute it, as would the choices of one request. Instead the
first computes it and the others wait, for the page that ends what they share, or for the end of the first one's prompt if they
share a good part of its last page. Then they start, with a hit.

A running sequence publishes pages as they fill. What it has of its present page is published when somebody comes who can use
it, so it costs those nothing that nobody follows. Imports `state`, `open_pages` and the table.
"""

from kvcache.hashing import hash_run, salt_seed
from kvcache.index import Match, common_prefix
from scheduler.resident import ResidentGroup
from scheduler.sequence import Sequence
from scheduler.state import ClusterState

WORTH_WAITING = 0.5
"""Of a page: so much of one must be in common, and not be computed yet, for a sequence to wait. Less is computed twice in
about the time of a step."""


class Sharing:
    """Works on the shared state; has none of its own."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._page_size = state.config.page_size
        self._least = max(1, int(WORTH_WAITING * self._page_size))
        self._least_part = state.config.stride or self._page_size  # a whole page is no part

    def announce(self, sequence: Sequence, cached_tokens: int) -> None:
        """From `cached_tokens` on the sequence will compute its prompt itself."""
        config, prompt = self._state.config, sequence.committed
        if prompt - cached_tokens < self._least or not (config.prefix_caching and config.wait_for_prefix):
            return
        full = (prompt - 1) // self._page_size
        keys = sequence.hashes[cached_tokens // self._page_size : full]
        if config.stride and prompt - max(cached_tokens, full * self._page_size) >= self._least:
            keys.append(self._end_key(sequence, full))
        if keys:
            self._state.waiting.prefixes.announce(sequence, keys)

    def awaited(self, sequence: Sequence, match: Match, reusable: int) -> int | None:
        """What a running sequence is about to compute of this one's prefix, after the cached part: a key of `prefixes`.

        reusable: tokens that a hit may cover.
        """
        prefixes, known = self._state.waiting.prefixes, len(match.nodes)
        if not (prefixes.announced and self._state.config.wait_for_prefix):
            return None
        whole = prefixes.shared(sequence.hashes[known : reusable // self._page_size])
        return whole if whole is not None else self._awaited_part(sequence, known, reusable)

    def _awaited_part(self, sequence: Sequence, page: int, reusable: int) -> int | None:
        start = page * self._page_size
        rest = sequence.buffer[start : min(start + self._page_size, reusable)].tobytes()
        for author in self._state.open_pages.alike(sequence, page, reusable):
            group = self._state.group_of(author)
            end = min(author.committed, start + self._page_size)
            common = common_prefix(author.buffer[start:end].tobytes(), rest)
            if group is None or common - max(0, group.computed(author.row) - start) < self._least:
                continue
            full = (author.committed - 1) // self._page_size
            key = author.hashes[page] if page < full else self._end_key(author, page)
            if self._state.waiting.prefixes.is_announced(key):
                return key
        return None

    def _end_key(self, sequence: Sequence, page: int) -> int:
        """For the end of its prompt, in this page: chained, as the hash of a full page is."""
        before = sequence.hashes[page - 1] if page else salt_seed(sequence.salt)
        return hash_run(sequence.buffer[page * self._page_size : sequence.committed].tobytes(), before)

    def show(self, sequence: Sequence, match: Match, reusable: int) -> None:
        """Publishes what running sequences have computed so far of the page that `sequence` needs next.

        `match` stays valid: nothing is taken away.
        """
        page = len(match.nodes)
        start = page * self._page_size
        for author in self._state.open_pages.alike(sequence, page, reusable):
            group = self._state.group_of(author)
            if group is not None and self._begins_alike(group, author, sequence, start):
                self._show(group, author, start)

    def _begins_alike(self, group: ResidentGroup, author: Sequence, sequence: Sequence, start: int) -> bool:
        end = start + self._least_part
        if group.computed(author.row) < end:
            return False
        group.write_back(author, max(author.committed, end))
        return author.buffer[start:end].tobytes() == sequence.buffer[start:end].tobytes()

    def _show(self, group: ResidentGroup, author: Sequence, start: int) -> None:
        blocks, computed = author.blocks, group.computed(author.row)
        assert blocks is not None
        if computed - start > blocks.inherited:
            group.write_back(author, max(author.committed, computed))
            self._state.table.publish_tail(blocks, author.buffer[start:computed].tobytes())
