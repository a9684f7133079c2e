"""Sums of what the front ends have observed: one for the whole cluster, so that metrics outlive the front end that saw them.

Pure; imports `messages`. A front end gathers its increments in the same way, see `deploy.observing.tally`.
"""

from collections.abc import Iterable

from scheduler.protocol.messages import TalliedMetric


class Tallies:
    """Counters and histograms, by name and labels. Their number is bounded by what the code names."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, tuple[tuple[str, str], ...]], TalliedMetric] = {}

    def add(self, increments: Iterable[TalliedMetric]) -> None:
        """A histogram whose buckets are not those of the sum so far begins anew: they are another version's, which would be cut
        off again and again if this were an error."""
        for new in increments:
            key = new.name, new.labels
            old = self._sums.get(key)
            self._sums[key] = new if old is None or len(old.buckets) != len(new.buckets) else _sum(old, new)

    def take(self) -> tuple[TalliedMetric, ...]:
        """The sums since the last call; they begin anew."""
        taken = self.snapshot()
        self._sums.clear()
        return taken

    def snapshot(self) -> tuple[TalliedMetric, ...]:
        return tuple(self._sums.values())


def _sum(old: TalliedMetric, new: TalliedMetric) -> TalliedMetric:
    buckets = tuple(a + b for a, b in zip(old.buckets, new.buckets, strict=True))
    return TalliedMetric(old.name, old.labels, buckets, old.total + new.total)
