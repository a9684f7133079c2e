"""One group's blocks: states, LRU order, and work that does not depend on the size of the pool."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvcache.blocks import BlockPool
from kvcache.ids import BlockId, NodeId


class Forgotten(list[NodeId]):
    """Records what a pool evicts."""

    def __call__(self, node: NodeId) -> None:
        self.append(node)


@pytest.fixture
def forgotten() -> Forgotten:
    return Forgotten()


def take(pool: BlockPool, count: int) -> list[BlockId]:
    blocks = [pool.allocate() for _ in range(count)]
    assert None not in blocks
    return [block for block in blocks if block is not None]


def cache(pool: BlockPool, count: int) -> list[BlockId]:
    """Blocks published as nodes 1, 2, ... and then released in this order."""
    blocks = take(pool, count)
    for at, block in enumerate(blocks):
        pool.publish(block, NodeId(at + 1))
    for block in blocks:
        pool.unpin(block)
    return blocks


def counts(pool: BlockPool) -> tuple[int, int, int]:
    assert pool.free + pool.held + pool.cached == pool.total
    assert pool.available == pool.free + pool.cached
    return pool.free, pool.held, pool.cached


def test_a_block_goes_through_all_states(forgotten: Forgotten) -> None:
    pool = BlockPool(2, forgotten)
    assert counts(pool) == (2, 0, 0)
    (block,) = take(pool, 1)
    assert counts(pool) == (1, 1, 0)
    pool.publish(block, NodeId(7))
    assert counts(pool) == (1, 1, 0)
    pool.unpin(block)
    assert counts(pool) == (1, 0, 1)
    pool.pin(block)
    assert counts(pool) == (1, 1, 0)
    pool.unpin(block)
    assert take(pool, 2)[1] == block  # the free block first, then the cached one
    assert counts(pool) == (0, 2, 0)
    assert forgotten == [7]
    assert pool.allocate() is None


def test_a_private_block_is_free_when_released(forgotten: Forgotten) -> None:
    pool = BlockPool(1, forgotten)
    (block,) = take(pool, 1)
    pool.unpin(block)
    assert counts(pool) == (1, 0, 0)
    assert take(pool, 1) == [block]
    assert not forgotten


def test_the_least_recently_released_is_evicted_first(forgotten: Forgotten) -> None:
    pool = BlockPool(4, forgotten)
    a, b, c, d = cache(pool, 4)
    pool.pin(b)  # from the middle
    pool.pin(a)  # from the front
    pool.unpin(b)
    pool.unpin(a)
    assert take(pool, 4) == [c, d, b, a]
    assert forgotten == [3, 4, 2, 1]


def test_reviving_the_last_and_the_only_cached_block(forgotten: Forgotten) -> None:
    pool = BlockPool(2, forgotten)
    a, b = cache(pool, 2)
    pool.pin(b)
    pool.pin(a)
    assert counts(pool) == (0, 2, 0)
    assert pool.allocate() is None
    pool.unpin(a)
    assert take(pool, 1) == [a]


def test_an_evicted_block_is_private_again(forgotten: Forgotten) -> None:
    pool = BlockPool(1, forgotten)
    cache(pool, 1)
    (block,) = take(pool, 1)
    assert not pool.nodes[block]
    pool.unpin(block)
    assert counts(pool) == (1, 0, 0)


def test_the_last_of_several_holders_releases(forgotten: Forgotten) -> None:
    pool = BlockPool(1, forgotten)
    (block,) = take(pool, 1)
    pool.publish(block, NodeId(1))
    pool.pin(block)
    pool.pin(block)
    assert pool.shared == 1
    pool.unpin(block)
    assert (pool.shared, pool.held) == (1, 1)
    pool.unpin(block)
    assert (pool.shared, pool.held) == (0, 1)
    pool.unpin(block)
    assert counts(pool) == (0, 0, 1)


def test_misuse_is_caught_before_it_changes_anything(forgotten: Forgotten) -> None:
    pool = BlockPool(2, forgotten)
    (block,) = take(pool, 1)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.pin(block)
    with pytest.raises(AssertionError, match="no holder"):
        pool.unpin(BlockId(1 - block))
    with pytest.raises(AssertionError, match="0 holders"):
        pool.publish(BlockId(1 - block), NodeId(1))
    pool.publish(block, NodeId(1))
    with pytest.raises(AssertionError, match="published already"):
        pool.publish(block, NodeId(2))
    assert counts(pool) == (1, 1, 0)


class CountingList(list[Any]):
    """Counts element accesses and refuses whatever takes time in proportion to the length."""

    accesses = 0

    def __getitem__(self, at: Any) -> Any:
        assert isinstance(at, int), "a slice"
        self.accesses += 1
        return super().__getitem__(at)

    def __setitem__(self, at: Any, value: Any) -> None:
        self.accesses += 1
        super().__setitem__(at, value)

    def pop(self, at: Any = -1) -> Any:
        assert at == -1, "pop from the middle"
        self.accesses += 1
        return super().pop()

    def append(self, value: Any) -> None:
        self.accesses += 1
        super().append(value)

    def _scan(self, *_: Any) -> Any:
        raise AssertionError("scanned a list")

    remove = index = insert = count = __contains__ = _scan

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("iterated over a list")


def accesses_of_a_life(total: int) -> list[int]:
    """List accesses of each step of a block's life in a full pool of `total` blocks, most of them cached."""
    pool = BlockPool(total, Forgotten())
    blocks = cache(pool, total)
    columns = {name: CountingList(getattr(pool, name)) for name in ("refs", "nodes", "before", "after", "free_stack")}
    for name, column in columns.items():
        setattr(pool, name, column)
    middle = blocks[total // 2]
    steps: list[int] = []

    def done() -> None:
        steps.append(sum(column.accesses for column in columns.values()))

    pool.pin(middle)
    done()
    pool.pin(middle)
    done()
    pool.unpin(middle)
    done()
    pool.unpin(middle)
    done()
    (block,) = take(pool, 1)
    done()
    pool.publish(block, NodeId(total + 1))
    done()
    pool.unpin(block)
    done()
    (block,) = take(pool, 1)
    done()
    pool.unpin(block)
    done()
    take(pool, 1)
    done()
    return steps


def test_the_work_does_not_depend_on_the_size_of_the_pool() -> None:
    small, large = accesses_of_a_life(16), accesses_of_a_life(65_536)
    assert small == large
    assert max(b - a for a, b in zip([0, *small], small, strict=False)) <= 10
