"""Prefixes that running sequences are about to compute, and who waits for them.

When it has been published they start, with a hit; why is told in `sharing`.
Keyed by chained hash alone: a collision costs a useless wait, never a wrong token, since `BlockTable.match` decides the hit.

Imports `sequence`.
"""

from collections.abc import Sequence as Listing

from scheduler.sequence import Sequence


class PendingPrefixes:
    """page hash -> the running sequence that announced it, and the sequences that wait for it. announced: by author, the hashes
    of the pages that it has not published yet, the first one last.

    No cycle: only running sequences are waited for, and a sequence that stops running withdraws what it announced.
    """

    def __init__(self) -> None:
        self._author: dict[int, Sequence] = {}
        self.announced: dict[Sequence, list[int]] = {}
        self._waiters: dict[int, list[Sequence]] = {}

    def announce(self, author: Sequence, hashes: Listing[int]) -> None:
        """`author` starts and will compute these pages, in this order."""
        new = [hash_ for hash_ in dict.fromkeys(hashes) if self._author.setdefault(hash_, author) is author]
        if new:
            self.announced[author] = new[::-1]

    def is_announced(self, hash_: int) -> bool:
        return hash_ in self._author

    def shared(self, hashes: Listing[int]) -> int | None:
        """The hash of the deepest page, of those that continue a cached prefix, that is being computed; None for none."""
        deepest = None
        for hash_ in hashes:
            if hash_ not in self._author:
                break
            deepest = hash_
        return deepest

    def wait(self, sequence: Sequence, hash_: int) -> None:
        self._waiters.setdefault(hash_, []).append(sequence)

    def published(self, author: Sequence, hash_: int) -> list[Sequence]:
        """`author` has published a page. Returns who waited for it; empty if it had not announced it."""
        announced = self.announced.get(author)
        if not announced or announced[-1] != hash_:
            return []
        announced.pop()
        if not announced:
            del self.announced[author]
        return self._settle(hash_)

    def withdraw(self, author: Sequence) -> list[Sequence]:
        """`author` runs no more. Returns who waited for pages that it has not published."""
        return [waiter for hash_ in self.announced.pop(author, ()) for waiter in self._settle(hash_)]

    def waiters(self) -> list[Sequence]:
        """All that wait, for the invariants."""
        return [waiter for waiters in self._waiters.values() for waiter in waiters]

    def orphans(self) -> list[Sequence]:
        """Who waits for a page that nobody computes: none, say the invariants."""
        return [waiter for hash_, waiters in self._waiters.items() if hash_ not in self._author for waiter in waiters]

    def authors(self) -> set[Sequence]:
        """All that have announced pages, for the invariants."""
        return set(self.announced)

    def _settle(self, hash_: int) -> list[Sequence]:
        del self._author[hash_]
        return self._waiters.pop(hash_, [])
