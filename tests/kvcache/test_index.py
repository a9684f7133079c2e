"""The prefix index: verified matches, holders, and the life of nodes."""

import numpy as np
import numpy.typing as npt
import pytest

from kvcache.hashing import hash_blocks
from kvcache.ids import BlockId, GroupId, NodeId
from kvcache.index import PrefixIndex
from kvcache.match import Match, groups_of

BLOCK = 16
ZERO, ONE, TWO = GroupId(0), GroupId(1), GroupId(2)
Tokens = npt.NDArray[np.int32]


def filled(*values: int) -> Tokens:
    """A prompt of one block for each value."""
    return np.repeat(np.array(values, np.int32), BLOCK)


@pytest.fixture
def index() -> PrefixIndex:
    index = PrefixIndex(BLOCK)
    for group in (ZERO, ONE, TWO):
        index.add_group(group)
    return index


def hold(
    index: PrefixIndex, group: GroupId, *values: int, salt: str = "", hashes: list[int] | None = None
) -> list[NodeId]:
    """Makes `group` hold the chain of these blocks, in blocks of the same numbers as the nodes."""
    nodes: list[NodeId] = []
    chain = hash_blocks(filled(*values), BLOCK, salt) if hashes is None else hashes
    for value, hash_ in zip(values, chain, strict=True):
        block = filled(value).tobytes()
        parent = nodes[-1] if nodes else index.root(salt)
        node = index.child(parent, hash_, block)
        if not node:
            node = index.add(group, BlockId(0), parent, hash_, block)
            index.blocks[group][node] = BlockId(node)
        elif node not in index.blocks[group]:
            index.hold(group, node, BlockId(node))
        nodes.append(node)
    return nodes


def match(index: PrefixIndex, *values: int, salt: str = "", limit: int = 99) -> Match:
    tokens = filled(*values)
    return index.match(tokens, hash_blocks(tokens, BLOCK, salt), salt, limit)


def test_a_match_tells_the_depth_of_every_group(index: PrefixIndex) -> None:
    chain = hold(index, ZERO, 1, 2, 3)
    hold(index, ONE, 1)
    found = match(index, 1, 2, 3, 4)
    assert found.nodes == chain
    assert found.depths == {ZERO: 3, ONE: 1}
    assert [found.depth(group) for group in (ZERO, ONE, TWO)] == [3, 1, 0]


def test_a_match_is_limited_by_limit_hashes_and_tokens(index: PrefixIndex) -> None:
    hold(index, ZERO, 1, 2, 3)
    tokens = filled(1, 2, 3)
    hashes = hash_blocks(tokens, BLOCK)
    assert match(index, 1, 2, 3, limit=2).depths == {ZERO: 2}
    assert match(index, 1, 2, 3, limit=0).depths == match(index, 1, 2, 3, limit=-1).depths == {}
    assert index.match(tokens, hashes[:1], "", 99).depths == {ZERO: 1}
    assert index.match(tokens[: 2 * BLOCK + 3], hashes, "", 99).depths == {ZERO: 2}


def test_a_block_in_another_place_is_no_match(index: PrefixIndex) -> None:
    hold(index, ZERO, 1, 2)
    assert match(index, 2).nodes == []
    assert match(index, 2, 1).nodes == []
    assert len(match(index, 1, 3).nodes) == 1


def test_a_match_survives_512_groups() -> None:
    index = PrefixIndex(BLOCK)
    for group in range(512):
        index.add_group(GroupId(group))
        hold(index, GroupId(group), *range(group % 5))
    found = match(index, *range(5))
    assert found.depths == {GroupId(group): group % 5 for group in range(512) if group % 5}


def test_groups_of_a_mask() -> None:
    assert groups_of(0) == ()
    assert groups_of(0b1) == (0,)
    assert groups_of(1 << 511 | 0b110) == (1, 2, 511)


def test_salts_are_isolated_even_where_hashes_collide(index: PrefixIndex) -> None:
    mine = hold(index, ZERO, 1, 2, salt="a", hashes=[5, 6])
    theirs = hold(index, ZERO, 1, 2, salt="b", hashes=[5, 6])
    assert not set(mine) & set(theirs)
    assert index.match(filled(1, 2), [5, 6], "a", 9).nodes == mine
    assert index.match(filled(1, 2), [5, 6], "b", 9).nodes == theirs
    assert index.match(filled(1, 2), [5, 6], "", 9).nodes == []


def test_equal_hashes_never_make_a_match(index: PrefixIndex) -> None:
    """All blocks collide: parent and tokens alone must tell them apart."""
    first = hold(index, ZERO, 1, 2, hashes=[7, 7])
    second = hold(index, ONE, 2, 1, hashes=[7, 7])
    third = hold(index, TWO, 1, 1, hashes=[7, 7])
    assert third[0] == first[0]
    assert len({*first, *second, *third}) == 5
    for values, depths in [
        ((1, 2), {ZERO: 2, TWO: 1}),
        ((2, 1), {ONE: 2}),
        ((1, 1), {TWO: 2, ZERO: 1}),
        ((2, 2), {ONE: 1}),
        ((3, 1), {}),
    ]:
        assert index.match(filled(*values), [7, 7], "", 9).depths == depths


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_node_leaves_a_chain_of_collisions_from_any_place(index: PrefixIndex, victim: int) -> None:
    nodes = [hold(index, ZERO, value, hashes=[7])[0] for value in (1, 2, 3)]
    index.forget(ZERO, nodes[victim])
    for at, value in enumerate((1, 2, 3)):
        assert index.match(filled(value), [7], "", 1).nodes == ([] if at == victim else [nodes[at]])
    for at in {0, 1, 2} - {victim}:
        index.forget(ZERO, nodes[at])
    assert not index.by_hash


def test_a_node_lives_as_long_as_some_group_holds_it(index: PrefixIndex) -> None:
    chain = hold(index, ZERO, 1, 2)
    hold(index, ONE, 1)
    index.forget(ZERO, chain[1])
    assert match(index, 1, 2).depths == {ZERO: 1, ONE: 1}
    index.forget(ZERO, chain[0])
    assert match(index, 1, 2).depths == {ONE: 1}
    index.forget(ONE, chain[0])
    assert match(index, 1, 2).nodes == []
    assert not index.by_hash
    assert not index.roots
    assert not index.salts


def test_ids_of_dead_nodes_and_roots_are_reused(index: PrefixIndex) -> None:
    for salt in map(str, range(100)):
        chain = hold(index, ZERO, 1, 2, salt=salt)
        for node in reversed(chain):
            index.forget(ZERO, node)
    assert len(index.parents) == 1 + 3  # NO_NODE, a root and two blocks


def test_a_reused_id_is_not_found_by_its_former_name(index: PrefixIndex) -> None:
    (old,) = hold(index, ZERO, 1)
    hold(index, ONE, 9)
    before = match(index, 1)
    index.forget(ZERO, old)
    (new,) = hold(index, ZERO, 2)
    assert new == old
    assert match(index, 1).nodes == []
    assert match(index, 2).nodes == [new]
    assert before.generation != index.generation


def test_a_parent_cannot_be_forgotten_before_its_child(index: PrefixIndex) -> None:
    chain = hold(index, ZERO, 1, 2)
    with pytest.raises(AssertionError, match="before its children"):
        index.forget(ZERO, chain[0])


def test_removing_a_group_in_any_order_leaves_the_others(index: PrefixIndex) -> None:
    hold(index, ZERO, 1, 2, 3, 4)
    hold(index, ONE, 1, 2)
    hold(index, ZERO, 8, 9, salt="mine")
    index.remove_group(ZERO)  # parents come before children in its dictionary
    assert match(index, 1, 2, 3, 4).depths == {ONE: 2}
    assert set(index.roots) == {""}
    index.remove_group(ONE)
    assert not index.by_hash
    assert not index.roots
    assert sorted(index.free_ids) == list(range(1, len(index.parents)))
