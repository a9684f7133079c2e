"""The audit finds what it is there to find: each kind of damage, by name."""

from collections.abc import Callable

import numpy as np
import pytest

from kvcache.audit import audit
from kvcache.hashing import hash_blocks
from kvcache.ids import BlockId, GroupId, NodeId
from kvcache.table import BlockTable, SequenceBlocks

BLOCK = 16
ZERO = GroupId(0)


def healthy() -> tuple[BlockTable, list[SequenceBlocks]]:
    """Group 0: blocks 0 and 1 held by two sequences, 2 and 3 private, 4 and 5 cached (5 is the child), 6 and 7 free."""
    table = BlockTable(BLOCK)
    table.add_group(ZERO, 8)
    table.add_group(GroupId(1), 2)
    tokens = np.repeat(np.array([1, 2, 8, 9], np.int32), BLOCK)
    shared, cached = tokens[: 2 * BLOCK], tokens[2 * BLOCK :]

    def start(prompt: np.ndarray[tuple[int], np.dtype[np.int32]], new_blocks: int) -> SequenceBlocks:
        hashes = hash_blocks(prompt, BLOCK)
        match = table.index.match(prompt, hashes, "", 2)
        seq = table.reserve(ZERO, match, match.depth(ZERO), new_blocks, "")
        assert seq is not None
        for at in range(len(seq.nodes), 2):
            table.publish(seq, prompt[at * BLOCK : (at + 1) * BLOCK].tobytes(), hashes[at])
        return seq

    first = start(shared, 3)
    second = start(shared, 1)
    table.release(start(cached, 2))
    return table, [first, second]


Damage = Callable[[BlockTable, list[SequenceBlocks]], object]


def rename(table: BlockTable, block: int, node: int) -> None:
    table.pools[ZERO].nodes[block] = NodeId(node)


def share_private(table: BlockTable, sequences: list[SequenceBlocks]) -> None:
    sequences[1].blocks.append(BlockId(2))
    table.pools[ZERO].refs[2] = 2


def swap_lru(table: BlockTable, _sequences: list[SequenceBlocks]) -> None:
    """Links the cached parent 4 before its child 5."""
    pool = table.pools[ZERO]
    pool.after[8], pool.after[4], pool.after[5] = 4, 5, 8
    pool.before[8], pool.before[5], pool.before[4] = 5, 4, 8


def drop_parent(table: BlockTable, _sequences: list[SequenceBlocks]) -> None:
    """Makes the cached parent 4 a free block, its node held elsewhere."""
    pool, index = table.pools[ZERO], table.index
    node = pool.nodes[4]
    index.hold(GroupId(1), node, BlockId(0))
    table.pools[GroupId(1)].nodes[0] = node
    table.pools[GroupId(1)].free_stack.remove(BlockId(0))
    table.pools[GroupId(1)].cached = 1
    table.pools[GroupId(1)].after[2] = table.pools[GroupId(1)].before[2] = 0
    index.forget(ZERO, node)
    pool.nodes[4] = NodeId(0)
    pool.after[5], pool.before[8] = 8, 5
    pool.cached = 1
    pool.free_stack.append(BlockId(4))


DAMAGES: list[tuple[str, Damage]] = [
    ("ref 3 but 2 holders", lambda t, _: t.pools[ZERO].pin(BlockId(0))),
    ("ref 2 but 1 holders", lambda _, s: s.pop()),
    ("pool counts 5", lambda t, _: setattr(t.pools[ZERO], "shared", 5)),
    ("has a block twice", lambda _, s: s[0].blocks.append(s[0].blocks[2])),
    ("private block 2 has 2 holders", share_private),
    ("more than blocks", lambda _, s: s[0].blocks.clear()),
    ("is in block 0, the sequence has 6", lambda _, s: s[0].blocks.__setitem__(0, BlockId(6))),
    ("is not a child of", lambda _, s: s[0].nodes.__setitem__(1, s[0].nodes[0])),
    ("but not by this sequence", lambda _, s: s[0].nodes.pop()),
    ("a sequence is left of group 5", lambda _, s: setattr(s[0], "group", GroupId(5))),
    ("free stack has a block twice", lambda t, _: t.pools[ZERO].free_stack.append(BlockId(6))),
    ("blocks \\[6, 7\\] are free", lambda t, _: t.pools[ZERO].free_stack.pop()),
    ("the pool counts 1", lambda t, _: setattr(t.pools[ZERO], "cached", 1)),
    ("in the LRU list, not", lambda t, _: t.pools[ZERO].before.__setitem__(4, 3)),
    ("LRU list ends with", lambda t, _: t.pools[ZERO].before.__setitem__(8, 5)),
    ("would be evicted before its child 5", swap_lru),
    ("but not its parent", drop_parent),
    ("published as the same node", lambda t, _: rename(t, 4, t.pools[ZERO].nodes[5])),
    ("the index has", lambda t, _: rename(t, 4, 99)),
    ("has not the holder mask", lambda t, s: t.index.holders.__setitem__(s[0].nodes[0], 0b11)),
    ("has not the hash of its tokens", lambda t, s: t.index.contents.__setitem__(s[0].nodes[1], b"x" * 64)),
    ("has not a count of 1 children", lambda t, s: t.index.children.__setitem__(s[0].nodes[0], 2)),
    ("cannot be found", lambda t, s: t.index.by_hash.pop(t.index.hashes[s[0].nodes[1]])),
    ("is found under", lambda t, s: t.index.by_hash.__setitem__(3, s[0].nodes[1])),
    ("a node id is free twice", lambda t, _: t.index.free_ids.extend([NodeId(2), NodeId(2)])),
    ("are dead", lambda t, _: t.index.free_ids.append(NodeId(2))),
    ("still has a parent", lambda t, _: t.index.children.__setitem__(0, 1)),
    ("not inverse", lambda t, _: t.index.roots.__setitem__("x", NodeId(1))),
    ("disagree on the groups", lambda t, _: t.index.add_group(GroupId(7))),
]


def test_a_healthy_table_passes() -> None:
    audit(*healthy())


@pytest.mark.parametrize(("message", "damage"), DAMAGES, ids=[message for message, _ in DAMAGES])
def test_damage_is_found(message: str, damage: Damage) -> None:
    table, sequences = healthy()
    damage(table, sequences)
    with pytest.raises(AssertionError, match=message):
        audit(table, sequences)
