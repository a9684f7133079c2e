"""Which rows of a step share a prefix: disjoint sets of equal blocks, found where they save most."""

import numpy as np
import pytest

from workers.execution.gpu.prefixes import PrefixFinder

Sets = list[tuple[list[int], int]]
"""(rows, blocks) of each."""


def sets_of(tables: list[list[int]], *, most_rows: int = 8, multiple: int = 1, least_saved: int = 1) -> Sets:
    width = max(map(len, tables))
    padded = np.array([table + [1 << 30] * (width - len(table)) for table in tables], np.int32)  # left there by others
    full = np.array([len(table) for table in tables])
    finder = PrefixFinder(most_rows, multiple, least_saved)
    first, found = (finder.find(padded, full) for _ in range(2))  # what the first left must not disturb the second
    assert first.members.tolist() == found.members.tolist()
    rows = np.split(found.members, np.cumsum(found.counts)[:-1]) if len(found.counts) else []
    return [(part.tolist(), int(blocks)) for part, blocks in zip(rows, found.blocks, strict=True)]


def test_one_prompt_of_all() -> None:
    tables = [[7, 8, 9, 20 + row] for row in range(5)]
    assert sets_of(tables) == [([0, 1, 2, 3, 4], 3)]
    assert sets_of(tables, most_rows=2) == [([0, 1], 3), ([2, 3], 3)], "the fifth is alone"


def test_nothing_in_common() -> None:
    assert sets_of([[1, 2], [3, 4], [5]]) == []
    assert sets_of([[1, 2], [3, 2]]) == [], "a block that follows another is another place in the cache"
    assert sets_of([[], []]) == [], "no block is complete: what stands in the table may still be written"


def test_two_prompts_and_one_beside_them() -> None:
    tables = [[1, 2, 3], [4, 5], [1, 2, 6], [9], [4, 5], [1, 2, 7]]
    assert sets_of(tables) == [([0, 2, 5], 2), ([1, 4], 2)]


def test_a_short_prefix_of_many_does_not_hide_a_long_one_of_few() -> None:
    long = [[1, 2, 3, 4, 5, 6, 7, 8, 30 + row] for row in range(3)]
    tables = [[1, 20], *long, [1, 21], [1, 22]]
    assert sets_of(tables) == [([1, 2, 3], 8), ([0, 4, 5], 1)]
    tables += [[1, 40 + row] for row in range(30)]
    assert sets_of(tables, most_rows=64) == [([0, *range(4, 36)], 1), ([1, 2, 3], 8)]
    short = [[1, 2, 3, 30 + row % 2] for row in range(4)]
    assert sets_of(short) == [([0, 1, 2, 3], 3)], "more in common, but of fewer"


def test_a_copy_of_a_block_before_the_same_block_is_another_prefix() -> None:
    assert sets_of([[1, 2, 3], [9, 2, 4], [1, 2, 5]]) == [([0, 2], 2)]


def test_a_prefix_is_a_multiple_of_what_the_kernel_takes_at_a_time() -> None:
    tables = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 9]]
    assert sets_of(tables, multiple=4) == [([0, 1], 4)]
    assert sets_of(tables, multiple=8) == []


def test_what_saves_too_little_is_left_alone() -> None:
    tables = [[1, 2, 3], [1, 2, 4], [5, 6], [5, 7]]
    assert sets_of(tables, least_saved=2) == [([0, 1], 2)]
    assert sets_of(tables, least_saved=3) == []


@pytest.mark.parametrize("seed", range(20))
def test_sets_are_disjoint_and_true(seed: int) -> None:
    chance = np.random.default_rng(seed)
    tables: list[list[int]] = []
    for _ in range(chance.integers(2, 40)):
        start = tables[chance.integers(len(tables))] if tables and chance.random() < 0.8 else []
        kept = start[: chance.integers(len(start) + 1)]
        tables.append([*kept, *chance.integers(1, 1000, chance.integers(0, 5)).tolist()])
    most = int(chance.integers(2, 9))
    found = sets_of([*tables, [1]], most_rows=most)
    members = [row for rows, _ in found for row in rows]
    assert len(members) == len(set(members))
    saved = [(len(rows) - 1) * blocks for rows, blocks in found]
    assert saved == sorted(saved, reverse=True)
    for rows, blocks in found:
        assert 2 <= len(rows) <= most
        assert len({tuple(tables[row][:blocks]) for row in rows}) == 1
        assert blocks > 0
