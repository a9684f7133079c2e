"""The prefix index: which page of which prefix is held by which groups, for the whole cluster.

Imports NumPy for types. Never counts references and never picks a block to evict; `blocks` does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.hashing import TOKEN_DTYPE, hash_run, page_bytes, salt_seed
from kvcache.ids import BlockId, GroupId, NodeId

NO_NODE = NodeId(0)

MAX_EVICTED = 1 << 18
"""Hashes of pages that nobody holds any more which are remembered, so that a miss can be told from a page never seen."""


MAX_CANDIDATES = 16
"""Pages with the same parent and the same first tokens that are compared with a prompt, the newest first."""


@lru_cache(maxsize=1024)
def groups_of(mask: int) -> tuple[GroupId, ...]:
    """The groups of a holder mask, ascending. Remembered: a cluster has few distinct masks at a time."""
    groups = []
    while mask:
        lowest = mask & -mask
        groups.append(GroupId(lowest.bit_length() - 1))
        mask ^= lowest
    return tuple(groups)


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


class Part(NamedTuple):
    """Where a match ends inside a page: the first `tokens` of the page `node` are what the prompt goes on with."""

    node: NodeId
    tokens: int


class PrefixIndex:
    """A forest of pages: one root per salt, and a node for each (parent node, hash, tokens) that some group holds.

    A node is an index into flat columns, not an object: `parents`, `hashes`, `contents` (the page's tokens as bytes),
    `holders` (bit g is set where group g holds it), `children` (a count) and `twins` (the next node of the same hash, a
    chain that is one long unless xxhash collides). `by_hash` finds a node from the chained hash, `blocks[g]` group g's
    block of a node: at most one. A page matches only if its hash, its parent and its tokens are equal, so a collision
    can cost a comparison but never a wrong hit, and salts are isolated even if their hashes were not.

    A *tail* is a node of a page that is only partly filled: the end of a sequence, as far as it is computed. It has one
    holder and no child, grows with its sequence, and becomes a full node in place. Full nodes are found by `by_hash`;
    both kinds also by `by_head`, from the hash of their first `stride` tokens chained to their parent's, through `older`
    and `newer`: a list of all pages that begin alike, the newest first. There the tokens decide how far a page matches, so
    reuse is exact to the token (the radix trees of SGLang, arXiv 2312.07104, reach the same by splitting their edges).

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
        "by_head",
        "children",
        "contents",
        "evicted",
        "free_ids",
        "generation",
        "hashes",
        "heads",
        "holders",
        "newer",
        "older",
        "parents",
        "roots",
        "salts",
        "stride",
        "twins",
    )

    def __init__(self, page_size: int, stride: int = 0) -> None:
        """stride: tokens of a page by which those that begin alike are found, below page_size; 0: only whole pages match."""
        self._page_bytes = page_size * TOKEN_DTYPE.itemsize
        self.stride = stride
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
        self.by_head: dict[int, NodeId] = {}
        self.heads = [0]
        self.older = [NO_NODE]
        self.newer = [NO_NODE]
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

    def chain(self, nodes: list[NodeId]) -> Match:
        """The match of a sequence's own nodes, from the first page on."""
        match = Match(nodes, {}, self.generation)
        alive = 0
        for depth, node in enumerate(nodes):
            mask = self.holders[node]
            if mask != alive:
                match.depths.update(dict.fromkeys(groups_of(alive & ~mask), depth))
                alive = mask
        match.depths.update(dict.fromkeys(groups_of(alive), len(nodes)))
        return match

    def parts(self, match: Match, tokens: npt.NDArray[np.int32], salt: str, limit: int) -> dict[GroupId, Part]:
        """By group, how far the page after its part of `match` agrees with `tokens` [tokens], `limit` tokens at most in all.

        A group without such a page, or with fewer than `stride` tokens of it in common, is absent.
        """
        found: dict[GroupId, Part] = {}
        root = self.roots.get(salt) if self.stride else None
        if root is None:
            return found
        page = self._page_bytes // TOKEN_DTYPE.itemsize
        for depth in {0, *match.depths.values()}:
            rest = tokens[depth * page : min((depth + 1) * page, limit)]
            if len(rest) < self.stride:
                continue
            parent = match.nodes[depth - 1] if depth else root
            node = self.by_head.get(self._head(page_bytes(rest), self.hashes[parent]), NO_NODE)
            for _ in range(MAX_CANDIDATES):
                if not node:
                    break
                if self.parents[node] == parent:
                    self._compare(node, rest, match, depth, found)
                node = self.older[node]
        return found

    def _compare(
        self, node: NodeId, tokens: npt.NDArray[np.int32], match: Match, depth: int, found: dict[GroupId, Part]
    ) -> None:
        """Enters what `node` has in common with `tokens` for each holder that has matched `depth` pages."""
        there = [group for group in groups_of(self.holders[node]) if match.depths.get(group, 0) == depth]
        if not there:
            return
        common = common_prefix(self.contents[node], tokens)
        if common < self.stride:
            return  # their heads' hashes collide
        for group in there:
            if group not in found or found[group].tokens < common:
                found[group] = Part(node, common)

    def child(self, parent: NodeId, hash_: int, page: bytes) -> NodeId:
        """The node of exactly this page under exactly this parent, or NO_NODE."""
        node = self.by_hash.get(hash_, NO_NODE)
        if node and (self.parents[node] != parent or self.contents[node] != page):
            return self._collided(node, parent, page)
        return node

    def add(self, parent: NodeId, hash_: int, page: bytes) -> NodeId:
        """A new node that `child` did not find. The caller makes some group hold it at once."""
        node = self._new(parent, hash_, page, self._head(page, self.hashes[parent]) if self.stride else 0)
        self.evicted.pop(hash_, None)
        self._list_by_hash(node, hash_)
        self.children[parent] += 1
        return node

    def add_tail(self, group: GroupId, parent: NodeId, content: bytes) -> NodeId:
        """A new node for a page that is filled by `content` only so far, `stride` tokens at least; `group` holds it at once.

        NO_NODE, and nothing has changed, if a recent page of the group begins with the same tokens.
        """
        head = self._head(content, self.hashes[parent])
        node = self.by_head.get(head, NO_NODE)
        for _ in range(MAX_CANDIDATES):
            if not node:
                break
            if self.parents[node] == parent and self.holders[node] >> group & 1 and self.contents[node].startswith(content):
                return NO_NODE
            node = self.older[node]
        node = self._new(parent, 0, content, head)
        self.children[parent] += 1
        return node

    def is_tail(self, node: NodeId) -> bool:
        return len(self.contents[node]) < self._page_bytes

    def grow_tail(self, node: NodeId, content: bytes) -> None:
        """The page has been filled further: `content` begins with what it had."""
        self.contents[node] = content

    def cut_tail(self, node: NodeId, tokens: int) -> None:
        """What follows the first `tokens`, `stride` at least, is about to be overwritten."""
        self.generation += 1
        self.contents[node] = self.contents[node][: tokens * TOKEN_DTYPE.itemsize]

    def fill_tail(self, node: NodeId, hash_: int, page: bytes) -> None:
        """The page is full: `child` has not found another like it."""
        self.contents[node] = page
        self.hashes[node] = hash_
        self.evicted.pop(hash_, None)
        self._list_by_hash(node, hash_)

    def root(self, salt: str) -> NodeId:
        """The root of `salt`, new if there is none. The caller adds a child to it at once."""
        root = self.roots.get(salt)
        if root is None:
            root = self.roots[salt] = self._new(NO_NODE, salt_seed(salt), b"", 0)
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

    def dispensable(self, nodes: list[NodeId]) -> int:
        """Which of these nodes of one group, each before its parents, to evict: the first that another pool has as well,
        unless that is a parent of one before it; without such a node the first. Last copies so stay longer than duplicates."""
        holders, parents = self.holders, self.parents
        for at, node in enumerate(nodes):
            mask = holders[node]
            if mask & (mask - 1):
                return at if node not in [parents[before] for before in nodes[:at]] else 0
        return 0

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

    def _head(self, content: bytes | memoryview, seed: int) -> int:
        """The key of `by_head`: the hash of the first `stride` tokens, chained to the page before."""
        return hash_run(content[: self.stride * TOKEN_DTYPE.itemsize], seed)

    def _new(self, parent: NodeId, hash_: int, page: bytes, head: int) -> NodeId:
        """head: of a page that is to be found by how it begins."""
        if self.free_ids:
            node = self.free_ids.pop()
            self.parents[node] = parent
            self.hashes[node] = hash_
            self.contents[node] = page
        else:
            node = NodeId(len(self.parents))
            self.parents.append(parent)
            self.hashes.append(hash_)
            self.contents.append(page)
            self.holders.append(0)
            self.children.append(0)
            for links in (self.twins, self.older, self.newer):
                links.append(NO_NODE)
            self.heads.append(0)
        if self.stride and parent:
            self.heads[node] = head
            older = self.by_head.get(head, NO_NODE)
            if older:
                self.older[node] = older
                self.newer[older] = node
            self.by_head[head] = node
        return node

    def _bury(self, node: NodeId) -> None:
        """Ends `node` if nothing holds it, then each ancestor that only waited for it."""
        while not (self.holders[node] or self.children[node]):
            parent = self.parents[node]
            if parent:
                if not self.is_tail(node):
                    self._unlist_by_hash(node)
                if self.stride:
                    self._unlist_by_head(node)
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
        self.twins[node] = self.by_hash.get(hash_, NO_NODE)
        self.by_hash[hash_] = node

    def _unlist_by_hash(self, node: NodeId) -> None:
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

    def _unlist_by_head(self, node: NodeId) -> None:
        older, newer = self.older[node], self.newer[node]
        if older or newer:
            self.older[node] = self.newer[node] = NO_NODE
        if older:
            self.newer[older] = newer
        if newer:
            self.older[newer] = older
        elif older:
            self.by_head[self.heads[node]] = older
        else:
            del self.by_head[self.heads[node]]


def common_prefix(content: bytes, tokens: npt.NDArray[np.int32]) -> int:
    """How many leading tokens of `content` are those of `tokens` [tokens], compared one by one."""
    length = min(len(content) // TOKEN_DTYPE.itemsize, len(tokens))
    differ = np.frombuffer(content, TOKEN_DTYPE, length) != tokens[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
