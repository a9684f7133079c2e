"""Maps keep the states of their pools, whole or thinned out, within their budget."""

import random

import numpy as np
import pytest

from deploy.status.maps import blocks_per_cell, pack, shown_block, thin, unpack
from scheduler.server.stats import PoolMap


def states(size: int, seed: int = 0) -> bytes:
    return bytes(random.Random(seed).choices(range(4), weights=(50, 30, 2, 18), k=size))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8191])
def test_packed_cells_come_back(size: int) -> None:
    cells = np.frombuffer(states(size), dtype=np.uint8)
    assert unpack(pack(cells), size).tolist() == cells.tolist()


@pytest.mark.parametrize(
    ("groups", "blocks", "expected"), [(1, 8000, 1), (8, 8000, 1), (4, 65536, 1), (64, 8000, 2), (64, 65000, 16)]
)
def test_the_budget_is_for_all_groups(groups: int, blocks: int, expected: int) -> None:
    pools = [PoolMap(group, bytes(blocks)) for group in range(groups)]
    assert blocks_per_cell(pools) == expected


@pytest.mark.parametrize("sizes", [[], [0], [5], [7, 5, 3], [100, 1, 1, 1], [64] * 9])
@pytest.mark.parametrize("budget", [9, 16, 33])
def test_a_thinned_map_fits(sizes: list[int], budget: int) -> None:
    pools = [PoolMap(group, bytes(size)) for group, size in enumerate(sizes)]
    blocks = blocks_per_cell(pools, budget)
    assert sum(len(thin(pool.states, blocks)) for pool in pools) <= budget
    if blocks > 1:  # no smaller number would do
        assert sum(-(-size // (blocks - 1)) for size in sizes) > budget


def test_a_cell_shows_one_of_its_blocks() -> None:
    pool, blocks = states(10_001), 16
    shown = shown_block(np.arange(626), blocks)
    assert all(cell * blocks <= block < (cell + 1) * blocks for cell, block in enumerate(shown.tolist()))
    assert thin(pool, blocks).tolist() == [pool[min(block, 10_000)] for block in shown.tolist()]


def test_a_thinned_map_keeps_proportions_and_shows_no_false_pattern() -> None:
    rare = thin(states(1 << 18), 16)
    assert 0.014 < np.mean(rare == 2) < 0.026  # 2 % of all blocks, which a majority would hide
    comb = thin(bytes([1, 0] * (1 << 15)), 16)  # every other block, which a fixed offset would show as all or nothing
    assert 0.45 < np.mean(comb) < 0.55
