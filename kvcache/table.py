"""The global block table: every group's blocks and the prefix index behind one transactional API.

Imports `blocks`, `index` and `standing`. Has no clock, no policy and no I/O; the scheduler core is its only caller and mutator.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvcache.blocks import UNPUBLISHED, BlockPool
from kvcache.hashing import TOKEN_DTYPE
from kvcache.ids import NARROW, BlockId, GroupId, NodeId, is_narrow, narrow_of
from kvcache.index import NO_NODE, PrefixIndex
from kvcache.match import Match, Part
from kvcache.standing import Standing, name_all

Copy = Callable[[BlockId, BlockId, int], None]
"""(source, target, tokens): the first tokens of one block of the group go to another, before any step launched later."""

GIVEN_BACK = BlockId(-1)
"""Stands in a block table for a block that its layers do not see any more."""


@dataclass(slots=True)
class SequenceBlocks:
    """One running sequence's row in the global block table: it owns the blocks that it lists, and nothing else says who does.
    Reference counts, the index and the worker's table follow from it. Only `BlockTable` changes it.

    blocks: in block-table order; each is pinned once by this sequence.
    nodes: the published prefix, its own blocks or shared ones: nodes[i] is the node of blocks[i].
    tail: of blocks[len(nodes)], the block that it fills at the moment, once a part of it is published; never shared.
    inherited: tokens that the first block after the hit begins with, found in the cache at the reservation; 0 once it is full.
    copied: they were copied there from a block that others may use, at the reservation; otherwise the block was taken over.
    first: where these layers see a window only: what stands before this block is not held, but `GIVEN_BACK`; nodes it has.
    Of a model with narrow layers beside others a sequence has two: the others' in its group's pool, theirs in `narrow_of` that.
    Invariant: len(nodes) <= len(blocks); blocks[len(nodes):] are private, but for the tail's.
    """

    group: GroupId
    blocks: list[BlockId]
    nodes: list[NodeId]
    salt: str
    tail: NodeId = NO_NODE
    inherited: int = 0
    copied: bool = False
    first: int = 0

    @property
    def held(self) -> list[BlockId]:
        """The blocks that are pinned, each once."""
        return self.blocks[self.first :]


class BlockTable:
    """Who holds which block of which group (`pools`), and which prefix each block contains (`index`): both are read as they
    are, and changed here alone.

    Every mutating call is a transaction: where it returns None or raises, nothing has changed. `None` means that there
    is no room now. No call depends on the number of blocks or groups, but for `add_group` and `remove_group`.

    One invariant carries the rest: *whoever holds a published block holds the published block of each of its ancestors*.
    A reservation pins from the first block on, and a block is published only under the sequence's own last node. What
    could break it is a twin, a block that two sequences of a group compute at the same time. If the second kept a
    private copy, as elsewhere, it could publish children of a block whose published block it does not hold; that block
    might be evicted above them, and the copy would occupy memory until the sequence ends. So the second *adopts* the
    published block in place of its own (`publish`). From the invariant follow, without counting children: leaves are
    evicted before their parents by release order alone (argument in `BlockPool`); reference counts and holder masks
    never grow on the way down a chain; a pinned block's ancestors are pinned, so `available` is true headroom.

    Where every layer of a model sees a window only, whoever holds a block holds those between it and the window's beginning,
    and gives back what is before (`trim`). It is cached, in the order in which it was given back, and may be evicted while what
    follows it is held. Then the invariant and what follows from it do not hold, and nothing that is done here needs them: a hit
    needs `window_blocks` before its end, wherever it begins. A sequence keeps its last published block, so the nodes above it
    live on in the index.

    Where some layers do and others see all, a group has two pools: that of the others, of which the invariant holds, and one of
    the narrow layers' part of the same tokens, named by the same nodes, of which what is said of windows does.
    """

    def __init__(
        self, block_size: int, stride: int = 0, window_blocks: int | None = None, narrow_blocks: int | None = None
    ) -> None:
        """stride: tokens in common from which a part of a block is reused, fewer than a block; 0: only whole blocks are.
        window_blocks: of those before a block's end, how many are seen from the next token on, 1 at least; None: all.
        narrow_blocks: the same of narrow layers beside others that see all; None: there are none."""
        assert window_blocks is None or window_blocks > 0, "the last published block is kept"
        assert narrow_blocks is None or (narrow_blocks > 0 and window_blocks is None), "narrow layers stand beside others"
        self.block_size = block_size
        self.window_blocks, self.narrow_blocks = window_blocks, narrow_blocks
        self._block_bytes, self._part_bytes = block_size * TOKEN_DTYPE.itemsize, stride * TOKEN_DTYPE.itemsize
        self.index = PrefixIndex(block_size, stride, window_blocks, narrow_blocks)
        self.pools: dict[GroupId, BlockPool] = {}

    def add_group(self, group: GroupId, blocks: int) -> None:
        """An empty pool of `blocks` blocks."""
        assert group not in self.pools, f"group {group} exists"
        self.pools[group] = BlockPool(blocks, partial(self.index.forget, group))
        self.index.add_group(group)

    def restore(self, group: GroupId, standing: Iterable[Standing]) -> None:
        """Publishes what an earlier table has left in the blocks of a group that is new to this one: all of it is cached.

        standing: a block before those that follow it, the most recently used first: they are evicted in the reverse order. A
        twin of another stays free, like a part that is too short to be found.
        Errors: ValueError for what cannot be; the group has to be removed then.
        """
        pool = self.pools[group]
        pool.restore(reversed(name_all(self.index, group, pool.total, standing)))

    def restore_beside(self, group: GroupId, standing: Iterable[tuple[BlockId, BlockId]]) -> None:
        """Publishes what stands in blocks of narrow layers, after what stands beside them in the group's pool was restored.

        standing: such a block and the group's block whose narrow part it has, which is full; the most recently used first. Left
        out is what stands beside something that was. Errors: ValueError for what cannot be; the group has to be removed then.
        """
        beside, nodes, index = narrow_of(group), self.pools[group].nodes, self.index
        pool, named, seen = self.pools[beside], list[tuple[BlockId, NodeId]](), set[BlockId]()
        for block, other in standing:
            if not 0 <= block < pool.total or block in seen or not 0 <= other < len(nodes):
                raise ValueError(f"block {block} of narrow layers is told twice, or there is none, or no block {other}")
            seen.add(block)
            node = nodes[other]
            if node and not index.is_tail(node) and node not in index.blocks[beside]:
                index.hold(beside, node, block)
                named.append((block, node))
        pool.restore(reversed(named))

    def remove_group(self, group: GroupId) -> None:
        """Forgets the group's every block, in time linear in the cached and shared ones.

        Its `SequenceBlocks` become void: drop them, never release them, as the id may name a new group by then.
        """
        del self.pools[group]
        self.index.remove_group(group)

    def evicted(self, hashes: Sequence[int]) -> int:
        """How many of these blocks, from the first on, some group held once and none does now, or none with what is seen before
        it. Only as far as remembered."""
        known, count = self.index.evicted, 0
        named = self.index.by_hash if self.index.given_back else {}
        for hash_ in hashes:
            if hash_ not in known and hash_ not in named:
                break
            count += 1
        return count

    def states(self, group: GroupId) -> bytes:
        """A byte a block, for people to look at: 0 free, 1 held, 2 shared, 3 cached. Linear in the blocks."""
        pool = self.pools[group]
        states = np.minimum(np.array(pool.refs, np.uint32), 2).astype(np.uint8)
        states[(states == 0) & (np.array(pool.nodes, np.int64) != UNPUBLISHED)] = 3
        return states.tobytes()

    def cached_in_match(self, group: GroupId, match: Match, depth: int) -> int:
        """How many of the first `depth` matched blocks of `group` nobody holds.

        They count as available, but pinning them takes them out: `reserve` needs new_blocks + this many available.
        Unheld blocks are the end of the chain (reference counts never grow on the way down), so where they begin is found
        in O(log depth). Where there is a window, of the blocks in it, one by one.
        """
        self._require(match, group, depth)
        held, refs = self.index.blocks[group], self.pools[group].refs
        if self.index.given_back and self.window_of(group) is not None:
            return sum(not refs[held[node]] for node in match.nodes[self.first_seen(group, depth) : depth])
        return depth - bisect_left(match.nodes, True, 0, depth, key=lambda node: not refs[held[node]])

    def reserve(
        self, group: GroupId, match: Match, depth: int, new_blocks: int, salt: str, part: Part | None = None,
        copy: Copy | None = None,
    ) -> SequenceBlocks | None:  # fmt: skip
        """Starts a sequence on the first `depth` matched blocks, pinned, and `new_blocks` others; None if no room. Matched ones
        that are not seen any more are neither pinned nor looked for.

        part: what the group has of the block after them; it is given up where there is no room to use it, so `inherited` says
        what became of it. copy: puts a copy into the group's log, at once; without it a part is only taken over. Pinning comes
        before allocating, so that a reservation never evicts its own hit.
        """
        pool = self.pools[group]
        self._require(match, group, depth)
        first = self.first_seen(group, depth) if self.index.given_back else 0
        spare = pool.available - new_blocks - depth + first  # at least; there is plenty as a rule, and no need to count
        if spare <= 0:
            spare += depth - first - self.cached_in_match(group, match, depth)
        if spare < 0:
            return None
        held = self.index.blocks[group]
        nodes = match.nodes[:depth]
        blocks = [held[node] for node in (nodes[first:] if first else nodes)]
        pool.pin(*blocks)
        if first:
            blocks[:0] = [GIVEN_BACK] * first
        seq = SequenceBlocks(group, blocks, nodes, salt, first=first)
        if part is None or not new_blocks:
            pool.allocate_to(blocks, new_blocks)
        elif self._may_take(group, part, new_blocks):
            self._take(pool, seq, part)
            pool.allocate_to(blocks, new_blocks - 1)
        elif copy is not None and (spare or pool.refs[held[part.node]]):
            self._copy(pool, seq, part, new_blocks, copy)
        else:
            pool.allocate_to(blocks, new_blocks)
        return seq

    def hold(self, group: GroupId, match: Match, depth: int, salt: str, part: Part | None = None) -> SequenceBlocks:
        """Pins what the group has of a match, to be read beside the steps: its first `depth` blocks and the block of `part`.

        Needs no room. `release` it like a sequence. part: of a block for which `may_hold` is true.
        """
        seq = self.reserve(group, match, depth, 0, salt)
        assert seq is not None, "a hold takes no blocks"
        if part is not None:
            block = self.index.blocks[group][part.node]
            self.pools[group].pin(block)
            seq.blocks.append(block)
            seq.tail = part.node
        return seq

    def may_hold(self, group: GroupId, part: Part) -> bool:
        """Whether a part's block stays as it is while it is pinned: the end of a sequence that runs no more."""
        index = self.index
        return index.is_tail(part.node) and not self.pools[group].refs[index.blocks[group][part.node]]

    def _may_take(self, group: GroupId, part: Part, new_blocks: int) -> bool:
        """Whether a part's block is taken over instead of copied: nobody uses it or what follows it, and it loses nothing.

        Or it loses the rest of its block where a copy would lose a whole one, as no block is free.
        """
        index, pool = self.index, self.pools[group]
        if pool.refs[index.blocks[group][part.node]] or index.children[part.node]:
            return False
        return len(index.contents[part.node]) == part.tokens * TOKEN_DTYPE.itemsize or pool.free < new_blocks

    def _take(self, pool: BlockPool, seq: SequenceBlocks, part: Part) -> None:
        """The sequence goes on in the block itself; what lies deeper in it is unpublished."""
        index = self.index
        block = index.blocks[seq.group][part.node]
        pool.pin(block)
        seq.blocks.append(block)
        seq.inherited = part.tokens
        if index.is_tail(part.node):
            index.cut_tail(part.node, part.tokens)
            seq.tail = part.node
        else:
            pool.unpublish(block)
            index.forget(seq.group, part.node)

    def _copy(self, pool: BlockPool, seq: SequenceBlocks, part: Part, new_blocks: int, copy: Copy) -> None:
        """The first of the new blocks begins as a copy. The command is in the log before the source may go, so whoever is
        granted it next writes to it later: nobody has to remember the source."""
        source, at = self.index.blocks[seq.group][part.node], len(seq.blocks)
        cached = not pool.refs[source]
        if cached:
            pool.pin(source)
        pool.allocate_to(seq.blocks, new_blocks)
        copy(source, seq.blocks[at], part.tokens)
        seq.inherited, seq.copied = part.tokens, True
        if cached:
            pool.unpin(source)

    def reserve_beside(
        self, seq: SequenceBlocks, match: Match, new_blocks: int, part: Part | None = None, copy: Copy | None = None
    ) -> SequenceBlocks | None:  # fmt: skip
        """The narrow layers' blocks of a sequence that has just been reserved the others' on this match, as `reserve` does it;
        None if there is no room. What of the match they need is pinned by it, or held by their own pool, so it is still good.

        A part is inherited by both or by neither.
        """
        there = match._replace(generation=self.index.generation)
        part = part if seq.inherited else None
        beside = self.reserve(narrow_of(seq.group), there, len(seq.nodes), new_blocks, seq.salt, part, copy)
        if seq.inherited and (beside is None or not beside.inherited):
            self._disinherit(seq)
        return beside

    def _disinherit(self, seq: SequenceBlocks) -> None:
        """What its first private block begins with is of no use: it will be computed."""
        if seq.tail:
            self.pools[seq.group].unpublish(seq.blocks[len(seq.nodes)])
            self.index.forget(seq.group, seq.tail)
            seq.tail = NO_NODE
        seq.inherited, seq.copied = 0, False

    def reserve_window(self, group: GroupId, depth: int, new_blocks: int, salt: str) -> SequenceBlocks | None:
        """`new_blocks` blocks from the first on that is seen after `depth` of them: what stands there will be brought. None if
        there is no room. Nothing is known of what is before them until `name_above`."""
        pool, first = self.pools[group], self.first_seen(group, depth)
        if new_blocks > pool.available:
            return None
        blocks = [GIVEN_BACK] * first
        pool.allocate_to(blocks, new_blocks)
        return SequenceBlocks(group, blocks, [], salt, first=first)

    def name_above(self, seq: SequenceBlocks, content: bytes, hash_: int) -> None:
        """Names the next of the blocks that a window which has been brought follows: as in `publish`, but nobody holds it here.
        All of them, then `publish` the window's first at once: what nobody holds lives by what is below it."""
        parent = seq.nodes[-1] if seq.nodes else self.index.root(seq.salt)
        seq.nodes.append(self.index.add_above(parent, hash_, content))

    def grow(self, seq: SequenceBlocks, blocks: int) -> list[BlockId] | None:
        """Appends `blocks` private blocks to the sequence and returns them; None if there are not so many."""
        pool = self.pools[seq.group]
        if blocks > pool.available:
            return None
        start = len(seq.blocks)
        pool.allocate_to(seq.blocks, blocks)
        return seq.blocks[start:]

    def publish(self, seq: SequenceBlocks, content: bytes, hash_: int) -> BlockId | None:
        """Publishes the sequence's next private block as a full block under its last node.

        content: its tokens, int32.

        hash_: of that block, chained from the block before. Call it once the step that wrote the block is committed.

        If another sequence of the group has published the same block in the meantime, this one adopts that block: it
        takes the private copy's place in `seq.blocks`, pinned, and the copy is free again. Returns the adopted block,
        else None. The worker must see the change of its block table before the copy is granted to anyone else; one
        ordered command log gives that. The contents are equal up to rounding, as with any hit.

        """
        at = len(seq.nodes)
        assert len(content) == self._block_bytes, f"a block has {self._block_bytes} bytes, not {len(content)}"
        index, group, block = self.index, seq.group, seq.blocks[at]
        seq.inherited = 0
        pool = self.pools[group]
        parent = seq.nodes[-1] if at else index.root(seq.salt)
        node = index.child(parent, hash_, content)
        if seq.tail:
            if node:
                pool.unpublish(block)
                index.forget(group, seq.tail)
            else:
                index.fill_tail(seq.tail, hash_, content)
            tail, seq.tail = seq.tail, NO_NODE
            if not node:
                seq.nodes.append(tail)
                return None
        adopted = None
        if not node:
            node = index.add(group, block, parent, hash_, content)
            pool.publish(block, node)
        elif (adopted := index.blocks[group].get(node)) is None:
            index.hold(group, node, block)
            pool.publish(block, node)
        else:
            pool.pin(adopted)
            pool.unpin(block)
            seq.blocks[at] = adopted
        seq.nodes.append(node)
        return adopted

    def publish_tail(self, seq: SequenceBlocks, content: bytes) -> None:
        """Publishes what the sequence has filled of its next block: int32 tokens, at least a stride and less than a block.

        Call it when the block is computed so far and committed; again when it has grown. Where another block of the group
        begins with the same tokens nothing happens: that one serves as well.
        """
        index, at = self.index, len(seq.nodes)
        assert self._part_bytes <= len(content) < self._block_bytes, f"{len(content)} bytes are no part of a block"
        if seq.tail:
            index.grow_tail(seq.tail, content)
            return
        parent = seq.nodes[-1] if at else index.root(seq.salt)
        seq.tail = index.add_tail(seq.group, seq.blocks[at], parent, content)
        if seq.tail:
            self.pools[seq.group].publish(seq.blocks[at], seq.tail)

    def window_of(self, pool: GroupId) -> int | None:
        """Blocks before a block's end that are seen of those in the pool; None: all."""
        return self.narrow_blocks if is_narrow(pool) else self.window_blocks

    def first_seen(self, pool: GroupId, depth: int) -> int:
        """The first block of the pool of which something is seen from the token on that follows `depth` whole blocks."""
        window_blocks = self.narrow_blocks if is_narrow(pool) else self.window_blocks
        return 0 if window_blocks is None else max(0, depth - window_blocks)

    def trim(self, seq: SequenceBlocks, depth: int) -> int:
        """Gives back the blocks that are not seen any more, once `depth` of them are full and, where prefixes are kept,
        published. Published ones stay cached, the first to be evicted first. Returns how many blocks that were."""
        first, former = self.first_seen(seq.group, depth), seq.first
        if first <= former:
            return 0
        self.pools[seq.group].unpin(*seq.blocks[former:first])
        seq.blocks[former:first] = [GIVEN_BACK] * (first - former)
        seq.first = first
        return first - former

    def release(self, seq: SequenceBlocks) -> None:
        """Unpins the sequence's blocks, deepest first, and empties it. Published blocks stay cached."""
        self.pools[seq.group].unpin(*reversed(seq.held if seq.first else seq.blocks))
        seq.blocks.clear()
        seq.nodes.clear()
        seq.tail, seq.first = NO_NODE, 0

    def _require(self, match: Match, group: GroupId, depth: int) -> None:
        """A match that some eviction has overtaken, or a depth that the group does not hold, is the caller's bug."""
        assert match.generation == self.index.generation, "a block was evicted since this match; match again"
        there = match.depth(GroupId(group & ~NARROW) if self.index.given_back else group)
        assert 0 <= depth <= there, f"group {group} holds {there} matched blocks, not {depth}"
        whole = not self.index.given_back or depth in (0, there) or self.window_of(group) is None
        assert whole, f"what is seen before {depth} blocks may be gone in group {group}, but not before {there}"
