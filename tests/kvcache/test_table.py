"""The global block table: transactions, sharing, twins, eviction and the known failures of prefix caches."""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvcache import hashing as hashing_module
from kvcache import index as index_module
from kvcache.audit import audit
from kvcache.hashing import hash_blocks
from kvcache.ids import GroupId
from kvcache.match import Match
from kvcache.table import BlockTable, SequenceBlocks
from tests.kvcache.usage import Usage, usage

BLOCK = 16
ZERO, ONE = GroupId(0), GroupId(1)


def filled(*values: int, block_size: int = BLOCK) -> npt.NDArray[np.int32]:
    """A prompt of one block for each value."""
    return np.repeat(np.array(values, np.int32), block_size)


def make_table(*sizes: int, block_size: int = BLOCK) -> BlockTable:
    table = BlockTable(block_size)
    for group, blocks in enumerate(sizes):
        table.add_group(GroupId(group), blocks)
    return table


def match(table: BlockTable, *values: int, salt: str = "", limit: int = 99) -> Match:
    tokens = filled(*values, block_size=table.block_size)
    return table.index.match(tokens, hash_blocks(tokens, table.block_size, salt), salt, limit)


def start(table: BlockTable, group: GroupId, *values: int, salt: str = "") -> SequenceBlocks:
    """Reserves a sequence that holds these blocks, reusing what it can."""
    found = match(table, *values, salt=salt)
    depth = found.depth(group)
    seq = table.reserve(group, found, depth, len(values) - depth, salt)
    assert seq is not None
    return seq


def publish(table: BlockTable, seq: SequenceBlocks, *values: int) -> list[int | None]:
    """Publishes all blocks of the sequence that are not, as `values`; returns the adopted blocks."""
    size = table.block_size
    tokens = filled(*values, block_size=size)
    hashes = hash_blocks(tokens, size, seq.salt)
    return [
        table.publish(seq, tokens[at * size : (at + 1) * size].tobytes(), hashes[at])
        for at in range(len(seq.nodes), len(values))
    ]


def compute(table: BlockTable, group: GroupId, *values: int, salt: str = "") -> SequenceBlocks:
    seq = start(table, group, *values, salt=salt)
    publish(table, seq, *values)
    return seq


def cache(table: BlockTable, group: GroupId, *values: int, salt: str = "") -> None:
    table.release(compute(table, group, *values, salt=salt))


def state(table: BlockTable) -> Any:
    """All that a transaction may change, to compare before and after."""
    columns = dict(vars(table.index))
    pools = {
        group: [getattr(pool, name) for name in ("refs", "nodes", "before", "after", "free_stack", "cached", "shared")]
        for group, pool in table.pools.items()
    }
    return copy.deepcopy((columns, pools))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_a_prompt_is_found_again(block_size: int) -> None:
    table = make_table(4, 4, block_size=block_size)
    first = compute(table, ZERO, 1, 2, 3)
    table.release(first)
    audit(table, [])
    assert (first.blocks, first.nodes) == ([], [])
    found = match(table, 1, 2, 3)
    assert found.depths == {ZERO: 3}
    again = table.reserve(ZERO, found, 3, 1, "")
    assert again is not None
    assert len(set(again.blocks)) == 4
    assert again.nodes == found.nodes
    assert usage(table, ZERO) == Usage(total=4, free=0, held=4, cached=0)
    audit(table, [again])


def test_sharing_outlives_the_sequence_that_computed() -> None:
    table = make_table(8)
    first = compute(table, ZERO, 1, 2)
    second = start(table, ZERO, 1, 2, 3)
    third = start(table, ZERO, 1, 4)
    assert first.blocks == second.blocks[:2]
    assert third.blocks[0] == first.blocks[0]
    assert table.pools[ZERO].shared == 2
    table.release(first)
    audit(table, [second, third])
    assert usage(table, ZERO) == Usage(total=8, free=4, held=4, cached=0)
    table.release(second)
    audit(table, [third])
    assert usage(table, ZERO) == Usage(total=8, free=5, held=2, cached=1)
    table.release(third)
    table.release(third)  # a second release has nothing left to release
    audit(table, [])
    assert usage(table, ZERO) == Usage(total=8, free=6, held=0, cached=2)


def test_a_block_that_was_evicted_and_reused_is_not_found() -> None:
    table = make_table(2)
    cache(table, ZERO, 1, 2)
    other = start(table, ZERO, 8, 9)  # takes both blocks and has not computed anything yet
    assert match(table, 1, 2).nodes == []
    audit(table, [other])
    publish(table, other, 8, 9)
    assert match(table, 1, 2).nodes == []
    assert match(table, 8, 9).depths == {ZERO: 2}


def test_only_what_is_published_is_found() -> None:
    table = make_table(4)
    seq = start(table, ZERO, 1, 2)
    assert match(table, 1, 2).nodes == []
    table.publish(seq, filled(1).tobytes(), hash_blocks(filled(1), BLOCK)[0])
    assert match(table, 1, 2).depths == {ZERO: 1}
    table.release(seq)
    assert usage(table, ZERO) == Usage(total=4, free=3, held=0, cached=1)
    audit(table, [])


def test_leaves_are_evicted_before_their_parents() -> None:
    table = make_table(4)
    cache(table, ZERO, 1, 2, 3, 4)
    for left in (3, 2, 1, 0):
        seq = table.reserve(ZERO, match(table), 0, 4 - left, "")
        assert seq is not None
        assert len(match(table, 1, 2, 3, 4).nodes) == left
        audit(table, [seq])
        table.release(seq)


def test_a_hit_on_a_prefix_keeps_leaves_before_parents() -> None:
    table = make_table(5)
    cache(table, ZERO, 1, 2, 3)
    prefix = start(table, ZERO, 1)
    table.release(prefix)  # the root block is now the most recent, its leaves the oldest
    cache(table, ZERO, 7)
    seq = table.reserve(ZERO, match(table), 0, 3, "")  # one free, then blocks 3 and 2
    assert seq is not None
    assert match(table, 1, 2, 3).depths == {ZERO: 1}
    audit(table, [seq])


def test_a_hit_is_never_evicted_by_its_own_reservation() -> None:
    table = make_table(3)
    cache(table, ZERO, 1, 2)
    found = match(table, 1, 2)
    assert table.pools[ZERO].available == 3
    assert table.cached_in_match(ZERO, found, 2) == 2
    before = state(table)
    assert table.reserve(ZERO, found, 2, 2, "") is None
    assert state(table) == before
    seq = table.reserve(ZERO, found, 2, 1, "")
    assert seq is not None
    assert seq.nodes == found.nodes
    audit(table, [seq])


def test_less_than_the_match_may_be_reserved() -> None:
    """The last block of a fully cached prompt is computed anew, and its twin adopted."""
    table = make_table(4)
    cache(table, ZERO, 1, 2)
    seq = table.reserve(ZERO, match(table, 1, 2), 1, 1, "")
    assert seq is not None
    assert len(seq.nodes) == 1
    private = seq.blocks[1]
    (adopted,) = publish(table, seq, 1, 2)
    assert adopted is not None
    assert adopted != private
    assert seq.blocks[1] == adopted
    assert usage(table, ZERO) == Usage(total=4, free=2, held=2, cached=0)
    audit(table, [seq])


def test_cached_in_match_counts_what_nobody_holds() -> None:
    table = make_table(8)
    cache(table, ZERO, 1, 2, 3)
    holder = start(table, ZERO, 1)
    found = match(table, 1, 2, 3)
    assert [table.cached_in_match(ZERO, found, depth) for depth in range(4)] == [0, 0, 1, 2]
    table.release(holder)
    assert table.cached_in_match(ZERO, match(table, 1, 2, 3), 3) == 3


def test_grow_is_all_or_nothing() -> None:
    table = make_table(4)
    cache(table, ZERO, 9)
    seq = start(table, ZERO, 1)
    before, blocks = state(table), list(seq.blocks)
    assert table.grow(seq, 4) is None
    assert state(table) == before
    assert seq.blocks == blocks
    grown = table.grow(seq, 3)
    assert grown is not None
    assert seq.blocks == blocks + grown
    assert table.grow(seq, 0) == []
    assert table.grow(seq, 1) is None
    assert match(table, 9).nodes == []  # the cached block was the last to go
    audit(table, [seq])


def test_twins_share_one_block_once_published() -> None:
    table = make_table(8)
    first, second = start(table, ZERO, 1, 2), start(table, ZERO, 1, 2)
    assert not set(first.blocks) & set(second.blocks)
    assert publish(table, first, 1, 2) == [None, None]
    assert publish(table, second, 1, 2) == first.blocks
    assert second.blocks == first.blocks
    assert usage(table, ZERO) == Usage(total=8, free=6, held=2, cached=0)
    audit(table, [first, second])
    table.release(first)
    audit(table, [second])
    assert table.pools[ZERO].held == 2


def test_twins_that_interleave_hold_each_others_blocks() -> None:
    table = make_table(8)
    first, second = start(table, ZERO, 1, 2), start(table, ZERO, 1, 2)
    publish(table, first, 1)
    publish(table, second, 1, 2)
    assert publish(table, first, 1, 2) == [second.blocks[1]]
    audit(table, [first, second])
    table.release(second)
    audit(table, [first])


def test_a_twin_revives_the_block_that_was_released_meanwhile() -> None:
    table = make_table(4)
    first, second = start(table, ZERO, 1), start(table, ZERO, 1)
    publish(table, first, 1)
    table.release(first)
    assert table.pools[ZERO].cached == 1
    assert publish(table, second, 1) == [second.blocks[0]]
    assert usage(table, ZERO) == Usage(total=4, free=3, held=1, cached=0)
    audit(table, [second])


def test_the_same_block_in_two_groups_is_one_node() -> None:
    table = make_table(4, 4)
    here, there = compute(table, ZERO, 1, 2), compute(table, ONE, 1)
    assert there.nodes == here.nodes[:1]
    assert match(table, 1, 2).depths == {ZERO: 2, ONE: 1}
    audit(table, [here, there])


def test_salts_are_isolated() -> None:
    table = make_table(8)
    mine = compute(table, ZERO, 1, 2, salt="a")
    assert match(table, 1, 2).nodes == match(table, 1, 2, salt="b").nodes == []
    theirs = compute(table, ZERO, 1, 2, salt="b")
    assert not set(mine.blocks) & set(theirs.blocks)
    audit(table, [mine, theirs])


def test_a_hash_collision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(_data: object, _seed: int = 0) -> int:
        return 42

    for module in (hashing_module, index_module):
        monkeypatch.setattr(module, "hash_run", constant)
    table = make_table(8)
    first = compute(table, ZERO, 1, 2)
    assert match(table, 1, 2).depths == {ZERO: 2}
    assert len(match(table, 1, 1).nodes) == 1
    assert match(table, 2, 1).nodes == match(table, 2).nodes == []
    second = compute(table, ZERO, 2, 1)
    assert not set(first.blocks) & set(second.blocks)
    table.release(first)
    table.release(second)
    for values in ((1, 2), (2, 1)):
        again = start(table, ZERO, *values)
        assert len(again.nodes) == 2
        table.release(again)


def test_removing_a_group_leaves_the_others_intact() -> None:
    table = make_table(4, 4)
    lost, kept = compute(table, ZERO, 1, 2, 3), compute(table, ONE, 1, 2)
    cache(table, ZERO, 9, salt="a")
    before = usage(table, ONE)
    table.remove_group(ZERO)
    audit(table, [kept])
    assert usage(table, ONE) == before
    assert match(table, 1, 2, 3).depths == {ONE: 2}
    with pytest.raises(KeyError):
        table.release(lost)
    table.add_group(ZERO, 2)
    assert match(table, 1, 2, 3).depths == {ONE: 2}
    assert usage(table, ZERO) == Usage(total=2, free=2, held=0, cached=0)
    audit(table, [kept])


def test_nodes_that_are_held_keep_their_ids_while_others_are_recycled() -> None:
    table = make_table(4)
    keeper = compute(table, ZERO, 1, 2)
    nodes = list(keeper.nodes)
    for value in range(3, 60):
        cache(table, ZERO, value, value)  # evicts the two before
        audit(table, [keeper])
    assert keeper.nodes == nodes
    assert match(table, 1, 2).nodes == nodes
    assert len(table.index.parents) <= 1 + 1 + 4 + 1


def test_a_match_that_an_eviction_has_overtaken_is_refused() -> None:
    table = make_table(2)
    cache(table, ZERO, 1, 2)
    stale = match(table, 1, 2)
    cache(table, ZERO, 3, 4)
    before = state(table)
    with pytest.raises(AssertionError, match="match again"):
        table.reserve(ZERO, stale, 2, 0, "")
    assert state(table) == before


def test_a_match_survives_a_release() -> None:
    """So that the scheduler may preempt between its match and its reservation."""
    table = make_table(2)
    victim = compute(table, ZERO, 1, 2)
    found = match(table, 1, 2)
    assert table.reserve(ZERO, found, 1, 1, "") is None
    table.release(victim)
    seq = table.reserve(ZERO, found, 1, 1, "")
    assert seq is not None
    audit(table, [seq])


def test_impossible_requests_change_nothing() -> None:
    table = make_table(4)
    seq = compute(table, ZERO, 1)
    before = state(table)
    with pytest.raises(AssertionError, match="holds 1 matched blocks, not 2"):
        table.reserve(ZERO, match(table, 1), 2, 0, "")
    with pytest.raises(IndexError):
        table.publish(seq, filled(2).tobytes(), 0)
    with pytest.raises(AssertionError, match="group 0 exists"):
        table.add_group(ZERO, 4)
    with pytest.raises(KeyError):
        table.remove_group(ONE)
    assert state(table) == before
    grown = start(table, ZERO, 1, 2)
    before = state(table)
    for other in (filled(2)[:-1], filled(2).astype(np.int64)):
        with pytest.raises(AssertionError, match=f"not {other.nbytes}"):
            table.publish(grown, other.tobytes(), 0)
    assert state(table) == before
