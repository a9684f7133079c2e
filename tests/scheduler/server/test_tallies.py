"""Increments of several front ends become one sum."""

from scheduler.protocol.messages import TalliedMetric
from scheduler.server.tallies import Tallies

STOP = (("outcome", "stop"),)
ABORT = (("outcome", "abort"),)


def test_counters_add_up_by_labels() -> None:
    tallies = Tallies()
    tallies.add([TalliedMetric("requests", STOP, (), 2.0), TalliedMetric("requests", ABORT, (), 1.0)])
    tallies.add([TalliedMetric("requests", STOP, (), 3.0)])
    assert set(tallies.snapshot()) == {TalliedMetric("requests", STOP, (), 5.0), TalliedMetric("requests", ABORT, (), 1.0)}


def test_histograms_add_up_bucket_by_bucket() -> None:
    tallies = Tallies()
    tallies.add([TalliedMetric("ttft", (), (1, 0, 2), 3.5)])
    tallies.add([TalliedMetric("ttft", (), (0, 4, 1), 1.5)])
    assert tallies.snapshot() == (TalliedMetric("ttft", (), (1, 4, 3), 5.0),)


def test_what_was_taken_is_counted_once() -> None:
    tallies = Tallies()
    tallies.add([TalliedMetric("requests", STOP, (), 2.0)])
    assert tallies.take() == (TalliedMetric("requests", STOP, (), 2.0),)
    assert tallies.take() == ()


def test_other_buckets_begin_anew() -> None:
    """Front ends of another version may have others, and serve beside the same scheduler."""
    tallies = Tallies()
    tallies.add([TalliedMetric("ttft", (), (1, 0, 2), 3.5), TalliedMetric("requests", STOP, (), 2.0)])
    tallies.add([TalliedMetric("ttft", (), (1, 0), 3.5), TalliedMetric("requests", STOP, (), 2.0)])
    assert tallies.snapshot() == (TalliedMetric("ttft", (), (1, 0), 3.5), TalliedMetric("requests", STOP, (), 4.0))
