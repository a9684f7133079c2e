"""The prefix index: which page of which prefix is held by which groups, for the whole cluster.

Imports NumPy for types. Never counts references and never picks a block to evict; `blocks` does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvcache.hashing import TOKEN_DTYPE, page_bytes, salt_seed
from kvcache.ids import BlockId, GroupId, NodeId

NO_NODE = NodeId(0)

MAX_EVICTED = 1 << 18
"""Hashes of pages that nobody holds any more which are remembered, so that a miss can be told from a page never seen."""


@lru_cache(maxsize=1024)
def groups_of(mask: int) -> tuple[GroupId, ...]:
    """The groups of a holder mask, ascending. Remembered: a cluster has few distinct masks at a time."""
    return tuple(GroupId(group) for group, bit in enumerate(reversed(f"{mask:b}")) if bit == "1")


@dataclass(slots=True, frozen=True)
class Match:
    """The longest chain of full pages known anywhere in the cluster for one prompt, and how much each group has of it.

    nodes: the chain, from the first page on. Its length is the greatest of all depths.
    depths: by group, the pages of the chain that it holds, contiguous from the first page; a group with none is absent.
    generation: the index's at the time of the match.
    Invariant: valid until the next mutation of the table. Node ids are reused, so a match that an eviction has
    overtaken might name other pages; the table refuses it by its generation.
    """

    nodes: list[NodeId]
    depths: dict[GroupId, int]
    generation: int

    def depth(self, group: GroupId) -> int:
        """Full pages of the chain that `group` holds, contiguous from the first page."""
        return self.depths.get(group, 0)


class PrefixIndex:
    """A forest of pages: one root per salt, and a node for each (parent node, hash, tokens) that some group holds.

    A node is an index into flat columns, not an object: `parents`, `hashes`, `contents` (the page's tokens as bytes),
    `holders` (bit g is set where group g holds it), `children` (a count) and `twins` (the next node of the same hash, a
    chain that is one long unless xxhash collides). `by_hash` finds a node from the chained hash, `blocks[g]` group g's
    block of a node: at most one. A page matches only if its hash, its parent and its tokens are equal, so a collision
    can cost a comparison but never a wrong hit, and salts are isolated even if their hashes were not.

    A node without a holder has no child. In each group whoever holds a page's block also holds its ancestors', and
    cached pages are evicted leaves first (see `BlockPool`), so a group that has a node has its parent too: `holders`
    only loses bits on the way down, and the last group to let a node go has let its children go before. `forget`
    asserts this. Only `remove_group`, which forgets in no order, passes through states where it does not hold.

    Lifetime: a node dies when no group holds it and it has no child; a root (which no group holds) with its last child.
    Ids of the dead are reused. That is safe because no id outlives its node: a sequence's nodes are those of blocks
    that it pins, which are never evicted; a block's node is cleared as it is evicted; a `Match` carries `generation`.
    """

    __slots__ = (
        "_page_bytes",
        "blocks",
        "by_hash",
        "children",
        "contents",
        "evicted",
        "free_ids",
        "generation",
        "hashes",
        "holders",
        "parents",
        "roots",
        "salts",
        "twins",
    )

    def __init__(self, page_size: int) -> None:
        self._page_bytes = page_size * TOKEN_DTYPE.itemsize
        self.generation = 0
        """Grows whenever some group forgets a page."""
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
        self.twins = [NO_NODE]
        self.free_ids: list[NodeId] = []

    def match(self, tokens: npt.NDArray[np.int32], hashes: Sequence[int], salt: str, limit: int) -> Match:
        """Walks down from the root of `salt`, at most `limit` pages of `tokens` with the chained hashes `hashes`."""
        nodes: list[NodeId] = []
        depths: dict[GroupId, int] = {}
        match = Match(nodes, depths, self.generation)
        parent = self.roots.get(salt)
        if parent is None:
            return match
        find, contents, parents, holders = self.by_hash.get, self.contents, self.parents, self.holders
        view = page_bytes(tokens)
        width = self._page_bytes
        alive = 0
        for depth in range(max(0, min(limit, len(hashes), len(view) // width))):
            node = find(hashes[depth])
            if node is None:
                break
            page = view[depth * width : depth * width + width].tobytes()
            if parents[node] != parent or contents[node] != page:
                node = self._collided(node, parent, page)
                if not node:
                    break
            mask = holders[node]
            if mask != alive:  # groups only drop out: mask is a subset of alive, but for the first page
                depths.update(dict.fromkeys(groups_of(alive & ~mask), depth))
                alive = mask
            nodes.append(node)
            parent = node
        depths.update(dict.fromkeys(groups_of(alive), len(nodes)))
        return match

    def child(self, parent: NodeId, hash_: int, page: bytes) -> NodeId:
        """The node of exactly this page under exactly this parent, or NO_NODE."""
        node = self.by_hash.get(hash_, NO_NODE)
        if node and (self.parents[node] != parent or self.contents[node] != page):
            return self._collided(node, parent, page)
        return node

    def add(self, parent: NodeId, hash_: int, page: bytes) -> NodeId:
        """A new node that `child` did not find. The caller makes some group hold it at once."""
        node = self._new(parent, hash_, page)
        self.evicted.pop(hash_, None)
        self.twins[node] = self.by_hash.get(hash_, NO_NODE)
        self.by_hash[hash_] = node
        self.children[parent] += 1
        return node

    def root(self, salt: str) -> NodeId:
        """The root of `salt`, new if there is none. The caller adds a child to it at once."""
        root = self.roots.get(salt)
        if root is None:
            root = self.roots[salt] = self._new(NO_NODE, salt_seed(salt), b"")
            self.salts[root] = salt
        return root

    def hold(self, group: GroupId, node: NodeId, block: BlockId) -> None:
        """`group` holds `node` in `block`. It holds the parent already, and held `node` nowhere."""
        self.blocks[group][node] = block
        self.holders[node] |= 1 << group

    def forget(self, group: GroupId, node: NodeId) -> None:
        """`group` has evicted its block of `node`, after those of all children of `node`."""
        self.generation += 1
        del self.blocks[group][node]
        holders = self.holders[node] & ~(1 << group)
        self.holders[node] = holders
        if not holders:
            assert not self.children[node], f"node {node} was evicted before its children"
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

    def _collided(self, node: NodeId, parent: NodeId, page: bytes) -> NodeId:
        """The node of this page among those that share the hash of `node` and follow it."""
        node = self.twins[node]
        while node and (self.parents[node] != parent or self.contents[node] != page):
            node = self.twins[node]
        return node

    def _new(self, parent: NodeId, hash_: int, page: bytes) -> NodeId:
        if self.free_ids:
            node = self.free_ids.pop()
            self.parents[node] = parent
            self.hashes[node] = hash_
            self.contents[node] = page
            return node
        self.parents.append(parent)
        self.hashes.append(hash_)
        self.contents.append(page)
        self.holders.append(0)
        self.children.append(0)
        self.twins.append(NO_NODE)
        return NodeId(len(self.parents) - 1)

    def _bury(self, node: NodeId) -> None:
        """Ends `node` if nothing holds it, then each ancestor that only waited for it."""
        while not (self.holders[node] or self.children[node]):
            parent = self.parents[node]
            if parent:
                self._unlink(node)
                self.children[parent] -= 1
            else:
                del self.roots[self.salts.pop(node)]
            self.parents[node] = NO_NODE
            self.contents[node] = b""
            self.free_ids.append(node)
            if not parent:
                return
            node = parent

    def _unlink(self, node: NodeId) -> None:
        """Takes `node` out of the chain of its hash."""
        hash_, after = self.hashes[node], self.twins[node]
        self.twins[node] = NO_NODE
        head = self.by_hash[hash_]
        if head != node:
            while self.twins[head] != node:
                head = self.twins[head]
            self.twins[head] = after
        elif after:
            self.by_hash[hash_] = after
        else:
            del self.by_hash[hash_]
            self.evicted[hash_] = None
            if len(self.evicted) > MAX_EVICTED:
                self.evicted.popitem(last=False)
