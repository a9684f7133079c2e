"""Reuse inside a block: which part matches, who copies, who takes over, and what the index forgets and keeps."""

import numpy as np
import numpy.typing as npt
import pytest

from kvcache.audit import audit
from kvcache.hashing import hash_blocks
from kvcache.ids import BlockId, GroupId
from kvcache.index import MAX_CANDIDATES
from kvcache.match import Part, common_prefix
from kvcache.table import BlockTable, SequenceBlocks

BLOCK, STRIDE = 16, 4
ZERO, ONE = GroupId(0), GroupId(1)

Tokens = npt.NDArray[np.int32]


def ids(*runs: tuple[int, int]) -> Tokens:
    """(token, how many of it) one after another."""
    return np.array([token for token, count in runs for _ in range(count)], np.int32)


def make_table(*sizes: int) -> BlockTable:
    table = BlockTable(BLOCK, STRIDE)
    for group, blocks in enumerate(sizes):
        table.add_group(GroupId(group), blocks)
    return table


def find(table: BlockTable, tokens: Tokens, salt: str = "", limit: int | None = None) -> dict[GroupId, Part]:
    limit = len(tokens) if limit is None else limit
    match = table.index.match(tokens, hash_blocks(tokens, BLOCK, salt), salt, limit // BLOCK)
    return table.index.parts(match, tokens, salt, limit)


class Log(list[tuple[BlockId, BlockId, int]]):
    """The copies of a group, in order: (source, target, tokens)."""

    def copy_part(self, source: BlockId, target: BlockId, tokens: int) -> None:
        self.append((source, target, tokens))


def start(
    table: BlockTable, tokens: Tokens, group: GroupId = ZERO, salt: str = "", blocks: int = 0, log: Log | None = None
) -> SequenceBlocks:
    """A sequence on all that the group has of `tokens`, with blocks for them, or `blocks` in all."""
    match = table.index.match(tokens, hash_blocks(tokens, BLOCK, salt), salt, len(tokens) // BLOCK)
    parts = table.index.parts(match, tokens, salt, len(tokens))
    depth = match.depth(group)
    total = blocks or -(-len(tokens) // BLOCK)
    seq = table.reserve(group, match, depth, total - depth, salt, parts.get(group), (Log() if log is None else log).copy_part)
    assert seq is not None
    return seq


def compute(table: BlockTable, seq: SequenceBlocks, tokens: Tokens) -> SequenceBlocks:
    """The sequence has computed `tokens`, all that it has: full blocks and the tail are published."""
    hashes = hash_blocks(tokens, BLOCK, seq.salt)
    for at in range(len(seq.nodes), len(hashes)):
        table.publish(seq, tokens[at * BLOCK : (at + 1) * BLOCK].tobytes(), hashes[at])
    if len(tokens) % BLOCK >= STRIDE:
        table.publish_tail(seq, tokens[len(hashes) * BLOCK :].tobytes())
    return seq


def cache(table: BlockTable, tokens: Tokens, group: GroupId = ZERO, salt: str = "") -> None:
    table.release(compute(table, start(table, tokens, group, salt), tokens))
    audit(table, [])


def common(table: BlockTable, tokens: Tokens, group: GroupId = ZERO, salt: str = "") -> int:
    part = find(table, tokens, salt).get(group)
    return part.tokens if part else 0


@pytest.mark.parametrize(
    ("content", "tokens", "expected"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([1], [2], 0), ([], [1], 0), ([1], [], 0)],
)
def test_common_prefix(content: list[int], tokens: list[int], expected: int) -> None:
    assert common_prefix(np.array(content, np.int32).tobytes(), np.array(tokens, np.int32).tobytes()) == expected


def test_a_match_inside_a_full_block_is_exact_to_the_token() -> None:
    table = make_table(4)
    cache(table, ids((7, 10), (8, 6)))
    for same in range(STRIDE, 11):
        assert common(table, ids((7, same), (9, 6))) == same
    assert common(table, ids((7, STRIDE - 1), (9, 6))) == 0, "fewer than a stride is not looked for"
    assert common(table, ids((7, 10), (8, 4))) == 14, "the block goes on beyond the prompt"


def test_the_end_of_a_finished_sequence_is_found_and_the_next_turn_goes_on_in_its_block() -> None:
    table = make_table(4)
    cache(table, ids((1, 16), (2, 7)))
    turn = ids((1, 16), (2, 7), (3, 20))
    free = table.pools[ZERO].free
    seq = start(table, turn)
    assert (seq.inherited, seq.copied) == (7, False)
    assert table.pools[ZERO].free == free - 1, "43 tokens need three blocks, of which two were there"
    compute(table, seq, turn)
    audit(table, [seq])
    table.release(seq)
    assert common(table, turn) == 11
    audit(table, [])


def test_what_a_running_sequence_has_computed_of_its_block_is_copied_while_it_goes_on() -> None:
    table = make_table(4)
    author = compute(table, start(table, ids((1, 9)), blocks=2), ids((1, 9)))
    log = Log()
    second = start(table, ids((1, 7), (2, 2)), log=log)
    assert (second.inherited, log) == (7, [(author.blocks[0], second.blocks[0], 7)])
    compute(table, author, ids((1, 16)))
    compute(table, second, ids((1, 7), (2, 9)))
    audit(table, [author, second])
    assert common(table, ids((1, 12))) == 12
    assert common(table, ids((1, 7), (2, 4))) == 11


def test_a_block_that_others_use_is_copied_whole_or_in_part() -> None:
    table = make_table(6)
    reader = compute(table, start(table, ids((1, 16))), ids((1, 16)))
    log = Log()
    other = start(table, ids((1, 12), (2, 4)), log=log)
    assert (other.inherited, log) == (12, [(reader.blocks[0], other.blocks[0], 12)])
    table.release(reader)
    audit(table, [other])
    assert common(table, ids((1, 16), (3, 4))[:15]) == 15, "it is still there"


def test_a_cached_block_with_free_blocks_beside_it_is_copied_so_that_both_ends_stay() -> None:
    table = make_table(3)
    cache(table, ids((1, 10), (2, 4)))
    seq = start(table, ids((1, 10), (3, 4)))
    assert (seq.inherited, seq.copied) == (10, True)
    compute(table, seq, ids((1, 10), (3, 4)))
    audit(table, [seq])
    assert common(table, ids((1, 10), (2, 4))) == 14
    assert common(table, ids((1, 10), (3, 4))) == 14


@pytest.mark.parametrize("rest", [4, 6], ids=["a tail", "a full block"])
def test_without_a_free_block_a_cached_one_is_taken_over_and_its_rest_unpublished(rest: int) -> None:
    table = make_table(1)
    cache(table, ids((1, 10), (2, rest)))
    seq = start(table, ids((1, 10), (3, 4)))
    assert (seq.inherited, seq.copied) == (10, False)
    audit(table, [seq])
    assert common(table, ids((1, 10), (2, rest))) == (10 if seq.tail else 0), "what is overwritten is not found any more"
    compute(table, seq, ids((1, 10), (3, 4)))
    audit(table, [seq])
    assert common(table, ids((1, 10), (3, 4))) == 14


def test_a_block_with_something_behind_it_is_never_taken_over() -> None:
    table = make_table(3)
    cache(table, ids((1, 16), (2, 16), (3, 16)))
    seq = start(table, ids((1, 16), (2, 9), (4, 7)))
    assert seq.inherited == 9
    assert seq.copied
    audit(table, [seq])
    assert common(table, ids((1, 16), (2, 12))) == 12


def test_what_is_copied_is_held_until_the_copy_is_in_the_log() -> None:
    table = make_table(3)
    cache(table, ids((1, 16), (2, 16)))
    held = list[int]()

    def copy(source: BlockId, target: BlockId, _: int) -> None:
        held.extend(table.pools[ZERO].refs[block] for block in (source, target))

    tokens = ids((1, 9), (3, 7))
    parts = find(table, tokens)
    seq = table.reserve(ZERO, table.index.match(tokens, hash_blocks(tokens, BLOCK), "", 0), 0, 1, "", parts[ZERO], copy)
    assert seq is not None
    assert held == [1, 1]
    audit(table, [seq])


def test_without_a_log_to_put_a_copy_in_a_part_is_not_copied() -> None:
    table = make_table(3)
    cache(table, ids((1, 16), (2, 16)))
    tokens = ids((1, 9), (3, 7))
    parts = find(table, tokens)
    seq = table.reserve(ZERO, table.index.match(tokens, hash_blocks(tokens, BLOCK), "", 0), 0, 1, "", parts[ZERO])
    assert seq is not None
    assert (seq.inherited, seq.copied) == (0, False)
    audit(table, [seq])


def test_a_part_is_given_up_where_there_is_no_room_for_it() -> None:
    table = make_table(2)
    cache(table, ids((1, 16), (2, 16)))
    seq = start(table, ids((1, 9), (3, 7), (4, 16)))
    assert (seq.inherited, seq.copied, len(seq.blocks)) == (0, False, 2), "both blocks are needed: nothing is left to copy from"
    audit(table, [seq])


def test_a_tail_gives_way_to_a_twin_that_was_full_first() -> None:
    table = make_table(4)
    slow = compute(table, start(table, ids((1, 16)), blocks=2), ids((1, 6)))
    fast = compute(table, start(table, ids((2, 16)), blocks=1), ids((2, 4)))
    table.release(fast)
    log = Log()
    fast = start(table, ids((1, 16)), log=log)
    assert [source for source, _, _ in log] == slow.blocks[:1]
    compute(table, fast, ids((1, 16)))
    private = slow.blocks[0]
    compute(table, slow, ids((1, 16)))
    assert slow.blocks[0] == fast.blocks[0] != private
    assert not slow.tail
    audit(table, [slow, fast])


def test_a_twin_in_another_group_does_not_matter_to_a_tail() -> None:
    table = make_table(2, 2)
    first = compute(table, start(table, ids((1, 16)), ZERO), ids((1, 6)))
    compute(table, first, ids((1, 16)))
    second = compute(table, start(table, ids((1, 16)), ONE, blocks=1), ids((1, 6)))
    compute(table, second, ids((1, 16)))
    audit(table, [first, second])
    assert first.nodes == second.nodes


def test_a_second_tail_that_begins_like_another_is_not_published_and_its_block_is_free_afterwards() -> None:
    table = make_table(3)
    first = compute(table, start(table, ids((1, 9)), blocks=1), ids((1, 9)))
    second = table.reserve(ZERO, table.index.match(ids(), [], "", 0), 0, 1, "")
    assert second is not None
    compute(table, second, ids((1, 9)))
    assert not second.tail
    table.release(second)
    assert table.pools[ZERO].free == 2
    table.release(first)
    assert table.pools[ZERO].cached == 1
    audit(table, [])


def test_each_group_matches_what_it_has_at_the_depth_that_it_has() -> None:
    table = make_table(4, 4)
    cache(table, ids((1, 16), (2, 10)), ZERO)
    cache(table, ids((1, 9)), ONE)
    parts = find(table, ids((1, 16), (2, 16)))
    assert {group: part.tokens for group, part in parts.items()} == {ZERO: 10, ONE: 9}


def test_tenants_do_not_see_each_other() -> None:
    table = make_table(4)
    cache(table, ids((1, 12)), salt="one")
    assert common(table, ids((1, 12)), salt="other") == 0
    assert common(table, ids((1, 12)), salt="one") == 12


def test_the_last_token_of_a_prompt_is_never_part_of_it() -> None:
    table = make_table(4)
    cache(table, ids((1, 12)))
    assert find(table, ids((1, 12)), limit=11)[ZERO].tokens == 11


def test_an_evicted_tail_is_forgotten() -> None:
    table = make_table(2)
    cache(table, ids((1, 12)))
    held = start(table, ids((2, 32)))
    assert common(table, ids((1, 12))) == 0
    audit(table, [held])


def test_the_newest_of_many_blocks_that_begin_alike_are_compared() -> None:
    table = make_table(2 * MAX_CANDIDATES + 2)
    for last in range(2 * MAX_CANDIDATES):
        cache(table, ids((1, 8), (100 + last, 4)))
    newest, oldest = 100 + 2 * MAX_CANDIDATES - 1, 100
    assert common(table, ids((1, 8), (newest, 4))) == 12
    assert common(table, ids((1, 8), (oldest, 4))) == 8


def test_without_a_stride_only_whole_blocks_match() -> None:
    table = BlockTable(BLOCK)
    table.add_group(ZERO, 4)
    seq = table.reserve(ZERO, table.index.match(ids((1, 16)), [], "", 1), 0, 1, "")
    assert seq is not None
    table.publish(seq, ids((1, 16)).tobytes(), hash_blocks(ids((1, 16)), BLOCK)[0])
    assert find(table, ids((1, 12))) == {}
    assert not table.index.heads.newest
    audit(table, [seq])


@pytest.mark.parametrize("tokens", [STRIDE - 1, BLOCK])
def test_what_is_no_part_cannot_be_published_as_one(tokens: int) -> None:
    table = make_table(2)
    seq = start(table, ids((1, 20)))
    with pytest.raises(AssertionError, match="no part of a block"):
        table.publish_tail(seq, ids((1, tokens)).tobytes())
