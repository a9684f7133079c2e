"""Reuse counts, lifetimes and relations, on pools of two blocks of two tokens."""

import pytest

from benchmarks.study.models.block_cache import BlockCache, tell
from benchmarks.study.models.streams import UNKNOWN
from benchmarks.study.questions.reuse import relations, reuse_histogram, top_share
from tests.study.requests import ask, workload


def test_a_block_is_born_reused_and_evicted() -> None:
    story = tell(
        workload(
            ask([1, 2, 3], [4], at_s=0.0, user=1, conversation=1),
            ask([1, 2, 5], [6], at_s=10.0, user=2, conversation=2),
            ask([7, 8, 9, 10, 11], [12], at_s=30.0, user=2, conversation=3),
        ),
        block=2, capacity=2,
    )  # fmt: skip
    assert (story.hit_tokens, story.prompt_tokens) == (2, 11)
    assert story.lives_s == [30.0]
    assert story.idles_s == [20.0]
    assert story.gaps_s == [10.0]
    assert sorted(story.reuses) == [0, 0, 1]
    assert relations(story) == {"other user": 1.0}


@pytest.mark.parametrize(
    ("user", "conversation", "relation"), [(1, 1, "same conversation"), (1, 2, "same user"), (2, 2, "other user")]
)
def test_who_reuses(user: int, conversation: int, relation: str) -> None:
    again = ask([1, 2, 4], 1, user=user, conversation=conversation)
    assert tell(workload(ask([1, 2, 3], 1, user=1, conversation=1), again), 2, None).relations == {relation: 1}


def test_a_trace_knows_conversations_alone() -> None:
    one, two = (ask([1, 2, tail], 1, user=UNKNOWN, conversation=tail) for tail in (3, 4))
    assert tell(workload(one, two), 2, None).relations == {"other conversation": 1}


def test_the_deepest_block_is_evicted_first() -> None:
    cache = BlockCache(2, 2)
    long = ask([1, 2, 3, 4, 5, 6, 7], 1)
    assert cache.take(long, 1) == 0
    assert len(cache) == 2
    assert cache.take(long, 1) == 2


def test_a_prompt_that_is_cached_to_its_end_computes_its_last_block() -> None:
    cache = BlockCache(2, None)
    cache.take(ask([1, 2], [3, 4]), 1)
    assert cache.take(ask([1, 2], 1), 1) == 0


def test_answers_that_a_trace_does_not_name_fill_blocks_that_nobody_finds() -> None:
    cache = BlockCache(2, None)
    cache.take(ask([1, 2], 5), 1)
    assert len(cache) == 3
    cache.take(ask([1, 2], 5), 1)
    assert len(cache) == 5


def test_histogram_and_top_share() -> None:
    reuses = [0] * 6 + [1, 2, 4, 93]
    histogram = reuse_histogram(reuses)
    assert histogram["0"] == 0.6
    assert histogram["3-4"] == histogram["17+"] == 0.1
    assert sum(histogram.values()) == pytest.approx(1.0)
    assert top_share(reuses, 0.1) == 0.93
