"""Verifies every invariant of a block table from scratch: for tests, the simulator and an idle scheduler's self-check.

Reads the internals of `table`, `blocks` and `index`, shares no code with them and changes nothing.
"""

from collections import Counter
from collections.abc import Iterable

import xxhash

from kvcache.blocks import BlockPool
from kvcache.hashing import salt_seed
from kvcache.ids import NARROW, BlockId, GroupId, NodeId, is_narrow
from kvcache.index import PrefixIndex
from kvcache.table import GIVEN_BACK, BlockTable, SequenceBlocks


def audit(table: BlockTable, sequences: Iterable[SequenceBlocks]) -> None:
    """Raises AssertionError, naming group, block or node, if `table` is not exactly what `sequences` account for.

    sequences: every one that was reserved and neither released nor made void by `remove_group`.
    Time linear in all blocks and tokens of the table.
    """
    by_group: dict[GroupId, list[SequenceBlocks]] = {group: [] for group in table.pools}
    for seq in sequences:
        _check(seq.group in by_group, f"a sequence is left of group {seq.group}, which is not in the table")
        by_group[seq.group].append(seq)
    _check(table.index.blocks.keys() == table.pools.keys(), "the index and the pools disagree on the groups")
    _audit_index(table.index)
    for group, pool in table.pools.items():
        for seq in by_group[group]:
            _audit_sequence(table.index, pool, seq)
        _audit_holders(group, pool, by_group[group])
        _audit_states(group, pool)
        _audit_names(group, pool, table.index)
    _check(
        table.narrow_blocks is None or {NARROW ^ pool for pool in table.pools} == table.pools.keys(),
        "a pool has no narrow layers' pool beside it, or that has none",
    )


def _check(condition: bool, message: str) -> None:
    """Not an assert statement: the audit must audit under `python -O` too."""
    if not condition:
        raise AssertionError(message)


def _window_blocks(index: PrefixIndex, pool: GroupId) -> int | None:
    """How many blocks before the next one are needed, of those in this pool; None: all."""
    return index.narrow_blocks if is_narrow(pool) else index.window_blocks


def _audit_sequence(index: PrefixIndex, pool: BlockPool, seq: SequenceBlocks) -> None:
    """One row of the table: a published prefix that is a chain of the index, then private blocks."""
    name = f"a sequence of group {seq.group} with blocks {seq.blocks}"
    _check(len(seq.nodes) <= len(seq.blocks), f"{name} has {len(seq.nodes)} nodes, more than blocks")
    _check(len(set(seq.held)) == len(seq.held), f"{name} has a block twice")
    _check({*seq.blocks[: seq.first]} <= {GIVEN_BACK}, f"{name} names blocks before {seq.first}, which it has given back")
    seen = len(seq.nodes) - (_window_blocks(index, seq.group) or len(seq.nodes))
    _check(not seq.nodes or seq.first <= max(0, seen), f"{name} has given back what it sees, up to block {seq.first}")
    parent = index.roots.get(seq.salt)
    held = index.blocks[seq.group]
    for at, (block, node) in enumerate(zip(seq.blocks, seq.nodes, strict=False)):
        _check(index.parents[node] == parent, f"{name}: node {node} is not a child of node {parent}")
        there = block if at < seq.first else held.get(node)
        _check(there == block, f"{name}: node {node} is in block {held.get(node)}, the sequence has {block}")
        parent = node
    private = seq.blocks[max(seq.first, len(seq.nodes)) :]
    if seq.tail:
        _check(bool(private), f"{name} has the tail {seq.tail} but no block for it")
        tail = private.pop(0)
        _check(index.is_tail(seq.tail), f"{name}: its tail, node {seq.tail}, is a full block")
        _check(index.parents[seq.tail] == parent or not seq.nodes, f"{name}: its tail is not a child of node {parent}")
        _check(held.get(seq.tail) == tail, f"{name}: its tail is in block {held.get(seq.tail)}, the sequence has {tail}")
    for block in private:
        _check(not pool.nodes[block], f"{name}: block {block} is published, but not by this sequence")


def _audit_holders(group: GroupId, pool: BlockPool, sequences: list[SequenceBlocks]) -> None:
    """Reference counts are numbers of holders, and only published blocks have several."""
    holders = Counter(block for seq in sequences for block in seq.held)
    for block, ref in enumerate(pool.refs):
        count = holders.pop(BlockId(block), 0)
        _check(ref == count, f"group {group}: block {block} has ref {ref} but {count} holders")
        _check(ref < 2 or bool(pool.nodes[block]), f"group {group}: private block {block} has {ref} holders")
    _check(not holders, f"group {group}: sequences hold blocks {sorted(holders)}, which are not in the pool")
    shared = sum(ref > 1 for ref in pool.refs)
    _check(pool.shared == shared, f"group {group}: {shared} blocks are shared, the pool counts {pool.shared}")


def _audit_states(group: GroupId, pool: BlockPool) -> None:
    """Each block is free, held or cached, and found where its state says."""
    unheld = [BlockId(block) for block, ref in enumerate(pool.refs) if not ref]
    free = {block for block in unheld if not pool.nodes[block]}
    cached = {block for block in unheld if pool.nodes[block]}
    stack, lru = pool.free_stack, lru_order(pool)
    _check(len(set(stack)) == len(stack), f"group {group}: the free stack has a block twice: {stack}")
    _check(set(stack) == free, f"group {group}: free stack {sorted(stack)} but blocks {sorted(free)} are free")
    _check(set(lru) == cached, f"group {group}: LRU list {lru} but blocks {sorted(cached)} are cached")
    _check(pool.cached == len(lru), f"group {group}: {len(lru)} blocks are cached, the pool counts {pool.cached}")
    _check(
        pool.free + pool.held + pool.cached == pool.total and pool.held == pool.total - len(unheld),
        f"group {group}: {pool.free} free + {pool.held} held + {pool.cached} cached is not {pool.total}",
    )


def lru_order(pool: BlockPool) -> list[BlockId]:
    """The cached blocks, the next to be evicted first."""
    order: list[BlockId] = []
    at, end = pool.after[pool.total], pool.total
    previous = end
    while at != end:
        _check(pool.before[at] == previous, f"block {at} follows {previous} in the LRU list, not {pool.before[at]}")
        _check(len(order) < pool.total, f"the LRU list does not end: {order}")
        order.append(BlockId(at))
        previous, at = at, pool.after[at]
    _check(pool.before[end] == previous, f"the LRU list ends with {previous}, the sentinel says {pool.before[end]}")
    return order


def _audit_names(group: GroupId, pool: BlockPool, index: PrefixIndex) -> None:
    """Blocks and nodes name each other; in pools without a window parents are held where children are, and evicted later."""
    held = index.blocks[group]
    published = {NodeId(node): BlockId(block) for block, node in enumerate(pool.nodes) if node}
    _check(len(published) == sum(map(bool, pool.nodes)), f"group {group}: two blocks are published as the same node")
    _check(held == published, f"group {group}: the index has {held}, the blocks have {published}")
    age = {block: at for at, block in enumerate(lru_order(pool))}
    for node, block in held.items():
        _check(bool(index.holders[node] >> group & 1), f"group {group} holds node {node} but is not in its holder mask")
        parent = index.parents[node]
        if _window_blocks(index, group) is not None or not index.parents[parent]:  # a root, which no group holds
            continue
        _check(parent in held, f"group {group} holds node {node} but not its parent {parent}")
        above = held[parent]
        _check(pool.refs[above] >= pool.refs[block], f"group {group}: block {block} has more holders than its parent")
        if above in age:
            _check(age[block] < age[above], f"group {group}: block {above} would be evicted before its child {block}")


def _audit_index(index: PrefixIndex) -> None:
    """Exactly the held nodes and the roots above them are alive, counted, hashed and found."""
    live = _live_nodes(index)
    masks: Counter[NodeId] = Counter()
    for group, held in index.blocks.items():
        for node in held:
            masks[node] += 1 << group
    for node in masks:
        _check(node in live, f"node {node} is held by groups {masks[node]:b} but cannot be found")
    children = Counter(index.parents[node] for node in live)
    for node in live:
        parent = index.parents[node]
        _check(parent in live or parent in index.salts, f"node {node} is under node {parent}, which is dead")
        windowed = index.window_blocks is not None or index.narrow_blocks is not None
        needed = masks[node] != 0 or (windowed and children[node] > 0)
        _check(needed, f"node {node} is alive but no group holds it")
        _check(index.holders[node] == masks[node], f"node {node} has not the holder mask {masks[node]:b}")
        _check(index.children[node] == children[node], f"node {node} has not a count of {children[node]} children")
        if index.is_tail(node):
            _check(masks[node].bit_count() == 1 and not children[node], f"tail {node} has a child, or is not in one group")
            continue
        digest = xxhash.xxh3_64_intdigest(index.contents[node], index.hashes[parent])
        _check(index.hashes[node] == digest, f"node {node} has not the hash of its tokens and parent, {digest:x}")
    _check({root: salt for salt, root in index.roots.items()} == index.salts, "roots and salts are not inverse")
    for root, salt in index.salts.items():
        _check(not index.parents[root] and not index.holders[root], f"root {root} has a parent or a holder")
        _check(index.children[root] == children[root] > 0, f"root {root} has not a count of {children[root]} children")
        _check(index.hashes[root] == salt_seed(salt), f"root {root} has not the hash of its salt")
    _audit_dead(index, live | index.salts.keys())


def _live_nodes(index: PrefixIndex) -> set[NodeId]:
    """The nodes that a lookup can reach; no two of them are the same block."""
    live: set[NodeId] = set()
    blocks: set[tuple[NodeId, bytes]] = set()
    for hash_, head in index.by_hash.items():
        node = head
        while node:
            _check(index.hashes[node] == hash_, f"node {node} of hash {index.hashes[node]:x} is found under {hash_:x}")
            _check(node not in live, f"node {node} is twice in the chain of its hash")
            block = (index.parents[node], index.contents[node])
            _check(block not in blocks, f"node {node} is the second with its parent {block[0]} and its tokens")
            _check(not index.is_tail(node), f"node {node} is only partly filled but found by the hash of a block")
            live.add(node)
            blocks.add(block)
            node = index.namesakes.get(node, NodeId(0))
    return live | _alike(index, live)


def _alike(index: PrefixIndex, full: set[NodeId]) -> set[NodeId]:
    """The nodes of blocks listed by how they begin: all full ones and all tails, each once."""
    listed: set[NodeId] = set()
    width = 4 * index.stride
    heads = index.heads
    for head, newest in heads.newest.items():
        node, newer = newest, NodeId(0)
        while node:
            _check(node not in listed, f"node {node} is twice in the lists of blocks that begin alike")
            told = heads.newer.get(node, NodeId(0))
            _check(told == newer, f"node {node} follows {newer} in its list, not {told}")
            content, seed = index.contents[node], index.hashes[index.parents[node]]
            _check(len(content) >= width, f"node {node} is listed with less than {index.stride} tokens")
            digest = xxhash.xxh3_64_intdigest(content[:width], seed)
            _check(digest == head, f"node {node} is listed under {head:x}, it begins with {digest:x}")
            _check(index.is_tail(node) or node in full, f"node {node} is full but not found by its hash")
            listed.add(node)
            node, newer = heads.older.get(node, NodeId(0)), node
    linked = heads.older.keys() | heads.newer.keys()
    _check(linked <= listed, f"nodes {sorted(linked - listed)} are linked to others but in no list")
    _check(listed >= full or not index.stride, f"nodes {sorted(full - listed)} are not listed by how they begin")
    return listed


def _audit_dead(index: PrefixIndex, alive: set[NodeId]) -> None:
    """Every id but NO_NODE is alive or free to be reused, not both, and the free ones are blank."""
    dead = index.free_ids
    ids = set(range(1, len(index.parents)))
    _check(len(set(dead)) == len(dead), f"a node id is free twice: {dead}")
    _check(set(dead) == ids - alive, f"free node ids {sorted(dead)}, but {sorted(ids - alive)} are dead")
    namesakes = set(index.namesakes) | set(index.namesakes.values())
    _check(namesakes <= alive, f"dead nodes {sorted(namesakes - alive)} are namesakes of others")
    for node in (NodeId(0), *dead):
        blank = not (index.parents[node] or index.contents[node] or index.holders[node] or index.children[node])
        _check(blank, f"dead node {node} still has a parent, tokens, a holder or a child")
