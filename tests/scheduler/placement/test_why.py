"""The record of a decision names the group that the sequence went to, and costs nothing unless somebody asks."""

import logging

import pytest

from scheduler.placement.why import Decision
from tests.scheduler.cluster import Cluster, filled


def test_what_is_told_is_what_was_done() -> None:
    cluster = Cluster((64, 64), fetch=True)
    told: list[Decision] = []
    cluster.core.explain(told.append)
    prefix = filled(*[0, 1] * 4)
    cluster.submit(prefix, max_tokens=1)
    cluster.run()
    cluster.submit([1] * 60, max_tokens=1)
    streams = [cluster.submit([*prefix, *own], max_tokens=1)[0] for own in ([1, 0, 0] * 27, [0, 0, 1] * 5)]
    for decision, stream in zip(told[2:], streams, strict=True):
        blocks = cluster.sequence(stream).blocks
        assert blocks is not None
        assert (decision.stream, decision.chosen.group) == (stream.number, blocks.group)
    fetched = told[2]
    assert (fetched.tokens, fetched.ways) == (32 + 81, 3)
    assert (fetched.chosen.source, fetched.chosen.hit_tokens, fetched.chosen.fetched_tokens) == (0, 32, 32)
    assert fetched.chosen.uncached == 4 * 81
    assert fetched.runner_up is not None
    assert fetched.runner_up.cost > fetched.chosen.cost
    cluster.run()


def test_the_log_says_it_where_it_is_asked_to(caplog: pytest.LogCaptureFixture) -> None:
    quiet = Cluster((8, 8))
    with caplog.at_level(logging.DEBUG, "scheduler.placement.why"):
        quiet.submit([1, 0, 1], max_tokens=1)
        assert not caplog.records
        cluster = Cluster((8, 8), log_decisions=True)
        cluster.submit([1, 1, 1], max_tokens=1)
    (record,) = caplog.records
    said = record.__dict__["fields"]
    assert (said["group"], said["tokens"], said["other_group"], said["uncached"]) == (0, 3, 1, 12)
    assert said["source"] is None, "and so it is left out of the line"
    cluster.run()
