"""A table of a model that sees a window: beginnings go while ends are held, and a hit needs the blocks before its end alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.audit import audit
from kvcache.hashing import hash_blocks
from kvcache.ids import GroupId
from kvcache.match import deepest, deepest_seen
from kvcache.table import GIVEN_BACK, BlockTable, SequenceBlocks
from tests.kvcache.test_table import BLOCK, ONE, ZERO, filled, match, publish, start

SEEN = 2


def make_table(*sizes: int) -> BlockTable:
    table = BlockTable(BLOCK, window_blocks=SEEN)
    for group, blocks in enumerate(sizes):
        table.add_group(GroupId(group), blocks)
    return table


def run_to(table: BlockTable, group: GroupId, *values: int, beside: tuple[SequenceBlocks, ...] = ()) -> SequenceBlocks:
    """A sequence that has computed these blocks one after the other, in a pool that may be smaller. beside: others."""
    seq = start(table, group, values[0])
    for depth in range(len(seq.nodes), len(values)):
        publish(table, seq, *values[: depth + 1])
        table.trim(seq, depth + 1)
        if depth + 1 < len(values):
            assert table.grow(seq, 1) is not None
        audit(table, [seq, *beside])
    return seq


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(1, 4))
def test_a_group_can_go_on_at_the_deepest_place_before_which_it_has_enough(masks: list[int], window: int) -> None:
    expected = {}
    for group in range(3):
        there = [mask >> group & 1 for mask in masks]
        depth = max(end for end in range(len(masks) + 1) if all(there[max(0, end - window) : end]))
        if depth:
            expected[group] = depth
    assert deepest(masks, window) == expected


def test_a_chain_outlives_the_eviction_of_its_beginning() -> None:
    table = make_table(4)
    values = (1, 2, 3, 4, 5, 6, 7)
    seq = run_to(table, ZERO, *values)
    assert (seq.first, seq.blocks[:5]) == (5, [GIVEN_BACK] * 5)
    assert table.pools[ZERO].held == 2
    assert sorted(table.index.blocks[ZERO]) == sorted(seq.nodes[3:])
    assert match(table, *values).depths == {ZERO: 7}
    assert match(table, *values[:6]).depths == {ZERO: 6}, "of the two blocks before it one is cached, one is held"
    assert match(table, *values[:4]).depths == {}
    table.release(seq)
    audit(table, [])
    hit = start(table, ZERO, *values, 8)
    assert (hit.first, len(hit.held), len(hit.nodes)) == (5, 3, 7)
    audit(table, [hit])


def test_the_end_of_a_chain_takes_those_with_it_that_only_waited_for_it() -> None:
    """And what has become of it is remembered: a prompt that comes again has been there."""
    table = make_table(4)
    table.release(run_to(table, ZERO, 1, 2, 3, 4, 5, 6, 7))
    other = start(table, ZERO, 11, 12, 13, 14)
    audit(table, [other])
    assert not table.index.by_hash
    assert table.evicted(hash_blocks(filled(1, 2, 3, 4, 5, 6, 7), BLOCK)) == 7


def test_blocks_that_nobody_can_go_on_from_count_as_evicted() -> None:
    table = make_table(4)
    seq = run_to(table, ZERO, 1, 2, 3, 4, 5, 6, 7)
    hashes = hash_blocks(filled(1, 2, 3, 4), BLOCK)
    assert not match(table, 1, 2, 3, 4).nodes
    assert table.evicted(hashes) == 4
    table.release(seq)


def test_tokens_of_blocks_that_are_gone_are_compared() -> None:
    """Where hashes collide a hit in the midst is still of exactly these tokens, from the first one on."""
    table = make_table(4)
    seq = run_to(table, ZERO, 1, 2, 3, 4, 5)
    forged = hash_blocks(filled(1, 2, 3, 4, 5), BLOCK)
    tokens = filled(9, 2, 3, 4, 5)
    assert table.index.match(tokens, forged, "", 5).nodes == []
    assert table.index.match(filled(1, 2, 3, 4, 5), forged, "", 5).depths == {ZERO: 5}
    table.release(seq)


def test_a_beginning_that_is_computed_again_is_published_again() -> None:
    table = make_table(4, 8)
    ending = run_to(table, ZERO, 1, 2, 3, 4, 5, 6)
    again = run_to(table, ONE, 1, 2, 3, beside=(ending,))
    audit(table, [ending, again])
    assert match(table, 1, 2, 3).depths == {ONE: 3}
    assert again.nodes == ending.nodes[:3], "as the nodes that the others' chain hangs from"
    table.remove_group(ZERO)
    audit(table, [again])
    assert match(table, 1, 2, 3, 4, 5, 6).depths == {ONE: 3}


def test_what_others_hold_stays_held() -> None:
    table = make_table(8)
    first = run_to(table, ZERO, 1, 2, 3)
    second = start(table, ZERO, 1, 2, 3, 4)
    assert second.first == 1
    publish(table, second, 1, 2, 3, 4)
    table.trim(second, 4)
    pool = table.pools[ZERO]
    assert [pool.refs[block] for block in first.held] == [1, 2]
    audit(table, [first, second])


def test_the_audit_finds_what_is_given_back_too_early() -> None:
    table = make_table(8)
    seq = run_to(table, ZERO, 1, 2, 3, 4)
    table.pools[ZERO].unpin(seq.blocks[2])
    seq.blocks[2], seq.first = GIVEN_BACK, 3
    with pytest.raises(AssertionError, match="has given back what it sees, up to block 3"):
        audit(table, [seq])


def test_the_audit_finds_what_is_named_though_it_was_given_back() -> None:
    table = make_table(8)
    seq = run_to(table, ZERO, 1, 2, 3, 4)
    seq.blocks[0] = seq.blocks[3]
    with pytest.raises(AssertionError, match="names blocks before 2, which it has given back"):
        audit(table, [seq])


def test_a_place_that_is_not_the_deepest_is_refused() -> None:
    """What is seen before it may be gone."""
    table = make_table(8)
    table.release(run_to(table, ZERO, 1, 2, 3, 4))
    found = match(table, 1, 2, 3, 4)
    with pytest.raises(AssertionError, match="may be gone in group 0, but not before 4"):
        table.reserve(ZERO, found, 3, 1, "")


def test_without_a_window_nothing_is_given_back() -> None:
    table = BlockTable(BLOCK)
    table.add_group(ZERO, 8)
    seq = start(table, ZERO, 1, 2, 3, 4)
    publish(table, seq, 1, 2, 3, 4)
    assert table.trim(seq, 4) == 0
    assert (seq.first, len(seq.held)) == (0, 4)
    assert np.all(np.array(seq.blocks) >= 0)


@given(st.lists(st.booleans(), max_size=8), st.integers(0, 8), st.integers(1, 4))
def test_it_is_cut_back_to_where_enough_is_there(there: list[bool], end: int, window: int) -> None:
    end = min(end, len(there))
    expected = max(depth for depth in range(end + 1) if all(there[max(0, depth - window) : depth]))
    assert deepest_seen(there, end, window) == expected
