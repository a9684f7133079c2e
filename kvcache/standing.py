"""What stands in a pool's blocks, as its group tells it to a table that is new to it. Imports the index and the hashing."""

from collections.abc import Iterable
from typing import NamedTuple

from kvcache.hashing import TOKEN_DTYPE, hash_run
from kvcache.ids import BlockId, GroupId, NodeId
from kvcache.index import NO_NODE, PrefixIndex


class Standing(NamedTuple):
    """What stands in a block, as its group knows it. before: the block before it; None: it is the first of prompts of `salt`.
    content: its tokens, int32; fewer than a block's where it is only partly filled."""

    block: BlockId
    before: BlockId | None
    salt: str
    content: bytes


def name_all(
    index: PrefixIndex, group: GroupId, blocks: int, standing: Iterable[Standing]
) -> list[tuple[BlockId, NodeId]]:
    """Enters into the index what `group` holds, see `BlockTable.restore`; the blocks with their nodes, in the same order.

    blocks: of its pool. Left out are twins and parts that are too short. Errors: ValueError.
    """
    held, block_bytes, part_bytes = index.blocks[group], index.block_bytes, index.stride * TOKEN_DTYPE.itemsize
    nodes: dict[BlockId, NodeId] = {}  # of full blocks, twins included; NO_NODE for others
    named: list[tuple[BlockId, NodeId]] = []
    for block, before, salt, content in standing:
        if not 0 <= block < blocks or block in nodes:
            raise ValueError(f"block {block} is told twice, or is not among the {blocks} of group {group}")
        above = nodes.get(before, NO_NODE) if before is not None else NO_NODE
        if before is not None and not above:
            raise ValueError(f"block {block} follows block {before}, which is not full or was not told before it")
        if not 0 < len(content) <= block_bytes or len(content) % TOKEN_DTYPE.itemsize:
            raise ValueError(f"block {block} has {len(content)} bytes of tokens")
        nodes[block] = NO_NODE
        if len(content) < block_bytes:
            if 0 < part_bytes <= len(content) and (tail := index.add_tail(group, block, above or index.root(salt), content)):
                named.append((block, tail))
            continue
        parent = above or index.root(salt)
        hash_ = hash_run(content, index.hashes[parent])
        node = index.child(parent, hash_, content)
        if not node:
            node = index.add(group, block, parent, hash_, content)
            named.append((block, node))
        elif node not in held:
            index.hold(group, node, block)
            named.append((block, node))
        nodes[block] = node
    return named
