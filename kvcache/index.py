"""The prefix index: which block of which prefix is held by which groups, for the whole cluster.

Imports the hashing, `heads` and `match`. Never counts references and never picks a block to evict; `blocks` does.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvcache.hashing import TOKEN_DTYPE, block_bytes, hash_run, salt_seed
from kvcache.heads import HeadLists
from kvcache.ids import NARROW, BlockId, GroupId, NodeId, is_narrow, narrow_of
from kvcache.match import EVERYWHERE, Match, Part, common_prefix, deepest, deepest_seen, groups_of

NO_NODE = NodeId(0)

NOT_NARROW = (1 << NARROW) - 1
"""Of a holder mask the pools that are no narrow layers'."""

MAX_EVICTED = 1 << 18
"""Hashes of blocks that nobody holds any more which are remembered, so that a miss can be told from a block never seen."""

MAX_CANDIDATES = 16
"""Blocks with the same parent and the same first tokens that are compared with a prompt, the newest first."""


class PrefixIndex:
    """A forest of blocks: one root per salt, and a node for each (parent node, hash, tokens) that some group holds.

    A node is an index into flat columns, not an object: `parents`, `hashes`, `contents` (the block's tokens as bytes),
    `holders` (bit g is set where group g holds it) and `children` (a count). `by_hash` finds a node from the chained hash,
    `namesakes` the next node of the same hash, of which there is none unless xxhash collides, and `blocks[g]` group g's block
    of a node: at most one. A block matches only if its hash, its parent and its tokens are equal, so a collision can cost
    a comparison but never a wrong hit, and salts are isolated even if their hashes were not.

    A *tail* is a node of a block that is only partly filled: the end of a sequence, as far as it is computed. It has one
    holder and no child, grows with its sequence, and becomes a full node in place. Full nodes are found by `by_hash`;
    both kinds also in `heads`, by the hash of their first `stride` tokens chained to their parent's. There the tokens
    decide how far a block matches, so reuse is exact to the token (the radix trees of SGLang, arXiv 2312.07104, reach the
    same by splitting their edges).

    A node without a holder has no child. In each group whoever holds a block's block also holds its ancestors', and
    cached blocks are evicted leaves first (see `BlockPool`), so a group that has a node has its parent too: `holders`
    only loses bits on the way down, and the last group to let a node go has let its children go before. `forget`
    asserts this. Only `remove_group`, which forgets in no order, passes through states where it does not hold.

    Of a model that sees a window only (`window_blocks`) none of that is so: the beginning of a chain is given back, and
    evicted, while its end is held. A node that nobody holds stays for the sake of those below it, tokens included, so a hit in
    the midst of a prompt compares all tokens from the first on, as any hit does. Of a model where only some layers do
    (`narrow_blocks`) it is so in their pools alone (`kvcache.ids.NARROW`), which have bits and blocks of their own.

    Lifetime: a node dies when no group holds it and it has no child; a root (which no group holds) with its last child.
    Ids of the dead are reused. That is safe because no id outlives its node: a sequence's nodes are those of blocks
    that it pins, which are never evicted; a block's node is cleared as it is evicted; a `Match` carries `generation`.
    """

    def __init__(
        self, block_size: int, stride: int = 0, window_blocks: int | None = None, narrow_blocks: int | None = None
    ) -> None:
        """stride: tokens of a block by which those that begin alike are found, below block_size; 0: only whole blocks match.
        window_blocks: before the end of a hit, of which something is seen by whoever goes on there; None: all are.
        narrow_blocks: the same of narrow layers, where others see all; None: there are none."""
        self.window_blocks, self.narrow_blocks = window_blocks, narrow_blocks
        self.given_back = window_blocks is not None or narrow_blocks is not None
        """Some pool may lack what is before that which it holds."""
        self.block_bytes = block_size * TOKEN_DTYPE.itemsize
        self._head_bytes = stride * TOKEN_DTYPE.itemsize
        self.stride = stride
        self.generation = 0
        """Grows whenever some group forgets a block."""
        self.blocks: dict[GroupId, dict[NodeId, BlockId]] = {}
        self.by_hash: dict[int, NodeId] = {}
        self.evicted: OrderedDict[int, None] = OrderedDict()
        self.roots: dict[str, NodeId] = {}
        self.salts: dict[NodeId, str] = {}
        self.parents = [NO_NODE]
        self.hashes = [0]
        self.contents = [b""]
        self.holders = [0]
        self.children = [0]
        self.namesakes: dict[NodeId, NodeId] = {}
        self.heads = HeadLists()
        self.free_ids: list[NodeId] = []

    def match(self, tokens: npt.NDArray[np.int32], hashes: Sequence[int], salt: str, limit: int) -> Match:
        """The longest chain of full blocks of `tokens` [tokens] held anywhere, from the root of `salt`, `limit` at most.

        hashes: `hash_blocks(tokens, block_size, salt)`. They only find candidates: parents and tokens are compared.
        """
        parent = self.roots.get(salt)
        if parent is None:
            return Match([], {}, self.generation)
        view, width, find = block_bytes(tokens), self.block_bytes, self.by_hash.get
        nodes: list[NodeId] = []
        for hash_ in hashes[: max(0, min(limit, len(view) // width))]:
            if (node := find(hash_)) is None:
                break
            nodes.append(node)
        known, parents, contents = view[: len(nodes) * width].tobytes(), self.parents, self.contents
        for depth, node in enumerate(nodes):
            if parents[node] != parent or not known.startswith(contents[node], depth * width):
                node = self._collided(node, parent, known[depth * width : (depth + 1) * width])
                if not node:
                    del nodes[depth:]
                    break
                nodes[depth] = node
            parent = node
        depths = self._depths(nodes)
        if self.given_back:
            del nodes[max(depths.values(), default=0) :]
        return Match(nodes, depths, self.generation)

    def chain(self, nodes: list[NodeId]) -> Match:
        """What each pool has of the blocks that a sequence has published: its nodes, from the first block on."""
        return Match(nodes.copy(), self._depths(nodes), self.generation)

    def _depths(self, nodes: list[NodeId]) -> dict[GroupId, int]:
        """By group, how many of a chain's nodes it holds, from the first on. Groups only drop out on the way down, but where
        there is a window."""
        if not nodes:
            return {}
        if self.window_blocks is not None:
            return deepest(map(self.holders.__getitem__, nodes), self.window_blocks)
        if self.narrow_blocks is not None:
            return self._depths_of_both(nodes, self.narrow_blocks)
        holders, depths = self.holders, dict[GroupId, int]()
        alive = holders[nodes[0]]
        if holders[nodes[-1]] != alive:
            for depth, node in enumerate(nodes):
                mask = holders[node]
                if mask != alive:
                    depths.update(dict.fromkeys(groups_of(alive & ~mask), depth))
                    alive = mask
        depths.update(dict.fromkeys(groups_of(alive), len(nodes)))
        return depths

    def _depths_of_both(self, nodes: list[NodeId], narrow_blocks: int) -> dict[GroupId, int]:
        """By group, after how many of a chain's nodes it could go on: it has all before, and of narrow layers what is seen."""
        depths, alive = dict[GroupId, int](), NOT_NARROW
        for depth, node in enumerate([*nodes, NO_NODE]):  # which nobody holds
            there = self.holders[node] & alive
            if depth and there != alive:
                depths.update(dict.fromkeys(groups_of(alive & ~there), depth))
            alive = there
            if not alive:
                break
        for group, depth in depths.items():
            beside = self.blocks[narrow_of(group)]
            depths[group] = deepest_seen([node in beside for node in nodes[:depth]], depth, narrow_blocks)
        return {group: depth for group, depth in depths.items() if depth}

    def parts(self, match: Match, tokens: npt.NDArray[np.int32], salt: str, limit: int) -> dict[GroupId, Part]:
        """By group, how far the block after its part of `match` agrees with `tokens` [tokens], `limit` tokens at most in all.

        A group without such a block, or with fewer than `stride` tokens of it in common, is absent. Where there are narrow
        layers, their pool has a part of as many tokens, or neither has one.
        """
        found: dict[GroupId, Part] = {}
        root = self.roots.get(salt) if self.stride else None
        if root is None:
            return found
        chain, holders, heads = match.nodes, self.holders, self.heads
        view, width, end = block_bytes(tokens), self.block_bytes, limit * TOKEN_DTYPE.itemsize
        for depth in {0, *match.depths.values()}:
            there = holders[chain[depth - 1]] if depth else EVERYWHERE
            if self.given_back:  # of those that hold the block before it, not all hold enough
                there &= self._mask(group for group in self.blocks if match.depth(group) == depth)
            if depth < len(chain):
                if not heads.has_others(chain[depth]):
                    continue  # whoever has a block that begins so has matched it
                if self.narrow_blocks is None:  # else a group may have it, but not its narrow layers' part of it
                    there &= ~holders[chain[depth]]
            rest, parent = view[depth * width : min((depth + 1) * width, end)], chain[depth - 1] if depth else root
            if len(rest) >= self._head_bytes and (nodes := heads.listed(self._head(rest, parent), MAX_CANDIDATES)):
                self._compare(nodes, parent, rest.tobytes(), there, found)
        return found if self.narrow_blocks is None else _in_both(found)

    def _mask(self, groups: Iterable[GroupId]) -> int:
        """Of these, and of their narrow layers."""
        mask = sum(1 << group for group in groups if not is_narrow(group))
        return mask if self.narrow_blocks is None else mask | mask << NARROW

    def _compare(self, nodes: Iterable[NodeId], parent: NodeId, rest: bytes, groups: int, found: dict[GroupId, Part]) -> None:
        """Enters what these nodes, if they follow `parent`, have in common with `rest`, for their holders among `groups`."""
        for node in nodes:
            there = self.holders[node] & groups if self.parents[node] == parent else 0
            if not there:
                continue
            common = common_prefix(self.contents[node], rest)
            if common < self.stride:
                continue  # their heads' hashes collide
            for group in groups_of(there):
                if group not in found or found[group].tokens < common:
                    found[group] = Part(node, common)

    def child(self, parent: NodeId, hash_: int, content: bytes) -> NodeId:
        """The node of exactly this block under exactly this parent, or NO_NODE."""
        node = self.by_hash.get(hash_, NO_NODE)
        if node and (self.parents[node] != parent or self.contents[node] != content):
            return self._collided(node, parent, content)
        return node

    def add(self, group: GroupId, block: BlockId, parent: NodeId, hash_: int, content: bytes) -> NodeId:
        """A new node that `child` did not find. `group`, which holds the parent, holds it in `block`."""
        node = self._new(parent, hash_, content, group, block)
        self._list_by_hash(node, hash_)
        if self.stride:
            self.heads.add(self._head(content, parent), node)
        return node

    def add_above(self, parent: NodeId, hash_: int, content: bytes) -> NodeId:
        """The node of a block that is above what a group is about to hold, without holding it; new if there is none. The caller
        adds a child to it at once."""
        node = self.child(parent, hash_, content)
        if not node:
            node = self._new(parent, hash_, content)
            self.children[parent] += 1
            self._list_by_hash(node, hash_)
            if self.stride:
                self.heads.add(self._head(content, parent), node)
        return node

    def add_tail(self, group: GroupId, block: BlockId, parent: NodeId, content: bytes) -> NodeId:
        """A new node for what is filled by `content` only so far, `stride` tokens at least; `group` holds it in `block`.

        NO_NODE, and nothing has changed, if a recent block of the group begins with the same tokens.
        """
        head = self._head(content, parent)
        alike = self.heads.listed(head, MAX_CANDIDATES)
        if alike and self._begins_so(group, parent, alike, content):
            return NO_NODE
        node = self._new(parent, 0, content, group, block)
        self.heads.add(head, node)
        return node

    def _begins_so(self, group: GroupId, parent: NodeId, nodes: Iterable[NodeId], content: bytes) -> bool:
        """Whether one of these, if it follows `parent` and the group has it, begins with `content`."""
        parents, holders, contents = self.parents, self.holders, self.contents
        return any(parents[at] == parent and holders[at] >> group & 1 and contents[at].startswith(content) for at in nodes)

    def is_tail(self, node: NodeId) -> bool:
        return len(self.contents[node]) < self.block_bytes

    def grow_tail(self, node: NodeId, content: bytes) -> None:
        """The block has been filled further: `content` begins with what it had."""
        self.contents[node] = content

    def cut_tail(self, node: NodeId, tokens: int) -> None:
        """What follows the first `tokens`, `stride` at least, is about to be overwritten."""
        self.generation += 1
        self.contents[node] = self.contents[node][: tokens * TOKEN_DTYPE.itemsize]

    def fill_tail(self, node: NodeId, hash_: int, block: bytes) -> None:
        """The block is full: `child` has not found another like it."""
        self.contents[node] = block
        self.hashes[node] = hash_
        self._list_by_hash(node, hash_)

    def root(self, salt: str) -> NodeId:
        """The root of `salt`, new if there is none. The caller adds a child to it at once."""
        root = self.roots.get(salt)
        if root is None:
            root = self.roots[salt] = self._new(NO_NODE, salt_seed(salt), b"")
            self.salts[root] = salt
        return root

    def hold(self, group: GroupId, node: NodeId, block: BlockId) -> None:
        """`group` holds `node` in `block`, and held it nowhere. Without a window it holds the parent already."""
        self.blocks[group][node] = block
        self.holders[node] |= 1 << group

    def forget(self, group: GroupId, node: NodeId) -> None:
        """`group` has evicted its block of `node`; without a window after those of all children of `node`."""
        self.generation += 1
        del self.blocks[group][node]
        holders = self.holders[node] & ~(1 << group)
        self.holders[node] = holders
        if not holders:
            assert self.given_back or not self.children[node], f"node {node} was evicted before its children"
            self._bury(node)

    def add_group(self, group: GroupId) -> None:
        self.blocks[group] = {}

    def remove_group(self, group: GroupId) -> None:
        """Forgets all that `group` holds: one pass over its blocks, in no order, so parents may wait for children."""
        self.generation += 1
        keep = ~(1 << group)
        holders = self.holders
        for node in self.blocks.pop(group):
            holders[node] &= keep
            if not holders[node]:
                self._bury(node)

    def _collided(self, node: NodeId, parent: NodeId, block: bytes) -> NodeId:
        """The node of this block among those that share the hash of `node` and follow it."""
        namesake = self.namesakes.get(node, NO_NODE)
        while namesake and (self.parents[namesake] != parent or self.contents[namesake] != block):
            namesake = self.namesakes.get(namesake, NO_NODE)
        return namesake

    def _head(self, content: bytes | memoryview, parent: NodeId) -> int:
        """The key of `heads`: the hash of the first `stride` tokens, chained to the block before."""
        return hash_run(content[: self._head_bytes], self.hashes[parent])

    def _new(
        self, parent: NodeId, hash_: int, content: bytes, group: GroupId | None = None, block: BlockId | None = None
    ) -> NodeId:
        """Held by `group` in `block`; a root by nobody."""
        mask = 0 if group is None else 1 << group
        if self.free_ids:
            node = self.free_ids.pop()
            self.parents[node] = parent
            self.hashes[node] = hash_
            self.contents[node] = content
            self.holders[node] = mask
        else:
            node = NodeId(len(self.parents))
            self.parents.append(parent)
            self.hashes.append(hash_)
            self.contents.append(content)
            self.holders.append(mask)
            self.children.append(0)
        if group is not None and block is not None:
            self.blocks[group][node] = block
            self.children[parent] += 1
        return node

    def _bury(self, node: NodeId) -> None:
        """Ends `node` if nothing holds it, then each ancestor that only waited for it."""
        while not (self.holders[node] or self.children[node]):
            parent, content = self.parents[node], self.contents[node]
            if parent:
                if len(content) == self.block_bytes:
                    self._unlist_by_hash(node)
                if self.stride:
                    self.heads.remove(self._head(content, parent), node)
                self.children[parent] -= 1
            else:
                del self.roots[self.salts.pop(node)]
            self.parents[node] = NO_NODE
            self.contents[node] = b""
            self.free_ids.append(node)
            if not parent:
                return
            node = parent

    def _list_by_hash(self, node: NodeId, hash_: int) -> None:
        self.evicted.pop(hash_, None)
        namesake = self.by_hash.setdefault(hash_, node)
        if namesake != node:
            self.namesakes[node] = namesake
            self.by_hash[hash_] = node

    def _unlist_by_hash(self, node: NodeId) -> None:
        hash_ = self.hashes[node]
        after, head = self.namesakes.pop(node, None), self.by_hash[hash_]
        if head != node:
            while self.namesakes[head] != node:
                head = self.namesakes[head]
            if after is not None:
                self.namesakes[head] = after
            else:
                del self.namesakes[head]
        elif after is not None:
            self.by_hash[hash_] = after
        else:
            del self.by_hash[hash_]
            self.evicted[hash_] = None
            if len(self.evicted) > MAX_EVICTED:
                self.evicted.popitem(last=False)


def _in_both(found: dict[GroupId, Part]) -> dict[GroupId, Part]:
    """Of parts, those that a pool and its narrow layers' have, each as far as both have it."""
    both: dict[GroupId, Part] = {}
    for pool, part in found.items():
        if not is_narrow(pool) and (beside := found.get(narrow_of(pool))) is not None:
            tokens = min(part.tokens, beside.tokens)
            both[pool], both[narrow_of(pool)] = Part(part.node, tokens), Part(beside.node, tokens)
    return both
