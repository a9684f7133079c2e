"""One group's blocks: reference counts, the free stack and the LRU list of cached blocks.

Imports nothing but the ids. Never knows tokens or hashes; it tells the index when a published block is evicted.
"""

from collections.abc import Callable, Iterable

from kvcache.ids import BlockId, NodeId

UNPUBLISHED = NodeId(0)
"""The node of a block that the index does not name. Real nodes count from 1."""


class BlockPool:
    """The states of one group's blocks. Every operation is O(1), whatever the number of blocks.

    A block is in exactly one state, so free + held + cached == total:

        free    ref 0, unpublished; on the stack `free_stack`
        held    ref > 0; published or private. A private block has exactly one holder
        cached  ref 0, published; in the LRU list, to be revived by a hit or evicted by an allocation

                allocate            publish
          free ----------> private --------> published    (both held)
           ^                  | unpin 1 -> 0     | unpin 1 -> 0
           +------------------+                  v
           +---- evicted by allocate -------- cached ---- pin ----> held again

    The LRU list is doubly linked through two flat lists, `before` and `after`, closed by a sentinel at index `total`:
    `after[total]` is the block to evict first, `before[total]` the one released last. Taking a block out of the middle,
    which every hit on a cached block does, is four list operations; nano-vLLM's `deque.remove` scans for it.

    Leaves before parents. Eviction must take a block's children before the block itself, else the children are
    unreachable and yet occupy memory. Release order alone gives this, and no child is counted, because of two rules
    that `BlockTable` keeps: (1) whoever holds a node's block holds the blocks of all its ancestors, and (2) a sequence
    releases its deepest block first. By (1) a cached parent has no held child. When the parent entered the list at
    its last release, each child that its releaser held had entered just before, by (2), and every other one earlier;
    and while the parent stays in the list no child can be revived or published, as that would pin the parent first.
    So along the list children always precede parents. Where a model sees a window only, (1) is given up: the beginning of a
    chain is cached, and evicted, while its end is held, and the index keeps what it must know of it.

    Held in lists of plain integers: indexing an `array` would build an int at every read, and an object per block
    would cost ten times the memory and be walked by the garbage collector.
    """

    def __init__(self, total: int, forget: Callable[[NodeId], None]) -> None:
        """forget: called with the node of a published block at the moment it is evicted."""
        self.total = total
        self.cached = 0
        self.shared = 0
        """Blocks with more than one holder."""
        self.evictions = 0
        """Cached blocks that allocations have taken since the pool was made."""
        self.refs = [0] * total
        self.nodes = [UNPUBLISHED] * total
        self.before = [total] * (total + 1)
        self.after = [total] * (total + 1)
        self.free_stack = [BlockId(block) for block in range(total - 1, -1, -1)]
        self._forget = forget

    @property
    def free(self) -> int:
        return len(self.free_stack)

    @property
    def held(self) -> int:
        return self.total - len(self.free_stack) - self.cached

    @property
    def available(self) -> int:
        """What `allocate` can still give."""
        return len(self.free_stack) + self.cached

    def allocate(self) -> BlockId | None:
        """A private block with one holder: a free one, else the least recently used cached one; None if all held."""
        if self.free_stack:
            block = self.free_stack.pop()
            self.refs[block] = 1
            return block
        if not self.cached:
            return None
        block = BlockId(self.after[self.total])
        after = self.after[block]
        self.after[self.total] = after
        self.before[after] = self.total
        self.cached -= 1
        self.evictions += 1
        node = self.nodes[block]
        self.nodes[block] = UNPUBLISHED
        self.refs[block] = 1
        self._forget(node)
        return block

    def allocate_to(self, blocks: list[BlockId], count: int) -> None:
        """Appends so many private blocks, which the caller knows to be available; as `allocate` does, one after the other."""
        easy = min(count, len(self.free_stack))
        if easy:
            taken = self.free_stack[: -easy - 1 : -1]
            del self.free_stack[-easy:]
            for block in taken:
                self.refs[block] = 1
            blocks += taken
        for _ in range(count - easy):
            cached = self.allocate()
            assert cached is not None, "the pool promised more blocks than it has"
            blocks.append(cached)

    def pin(self, *blocks: BlockId) -> None:
        """Adds a holder to published blocks; a cached one is held again. Sharing a private block is a bug."""
        refs, nodes, linked_before, linked_after = self.refs, self.nodes, self.before, self.after
        for block in blocks:
            assert nodes[block], f"block {block} is not published and cannot be shared"
            ref = refs[block]
            refs[block] = ref + 1
            if ref == 0:
                before, after = linked_before[block], linked_after[block]
                linked_after[before] = after
                linked_before[after] = before
                self.cached -= 1
            elif ref == 1:
                self.shared += 1

    def unpin(self, *blocks: BlockId) -> None:
        """Takes a holder from held blocks. Without the last one a published block is cached, a private one free."""
        refs, nodes, before, after, end = self.refs, self.nodes, self.before, self.after, self.total
        for block in blocks:
            ref = refs[block] - 1
            assert ref >= 0, f"block {block} has no holder to release it"
            refs[block] = ref
            if ref == 1:
                self.shared -= 1
            elif ref == 0:
                if nodes[block]:
                    last = before[end]
                    after[last] = block
                    before[block] = last
                    after[block] = end
                    before[end] = block
                    self.cached += 1
                else:
                    self.free_stack.append(block)

    def restore(self, cached: Iterable[tuple[BlockId, NodeId]]) -> None:
        """Blocks of a pool that has given none away turn out to be published: they are cached, the first to be evicted first.

        The caller has children before their parents, as releases would have had them.
        """
        assert self.free == self.total, "a pool that is in use knows its own blocks"
        nodes, before, after, end = self.nodes, self.before, self.after, self.total
        for block, node in cached:
            nodes[block] = node
            last = before[end]
            after[last] = block
            before[block] = last
            before[end] = block
            self.cached += 1
        after[before[end]] = end
        self.free_stack = [block for block in self.free_stack if not nodes[block]]

    def publish(self, block: BlockId, node: NodeId) -> None:
        """Names the content of a private block: from now on it may be shared, and is cached when released."""
        assert self.refs[block] == 1, f"block {block} has {self.refs[block]} holders; one must publish it"
        assert not self.nodes[block], f"block {block} is published already, as node {self.nodes[block]}"
        self.nodes[block] = node

    def unpublish(self, block: BlockId) -> None:
        """The content of a held block loses its name; its one holder may overwrite it. The caller tells the index."""
        assert self.refs[block] == 1, f"block {block} has {self.refs[block]} holders and cannot be taken over"
        self.nodes[block] = UNPUBLISHED
