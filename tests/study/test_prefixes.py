"""Longest common prefixes and what a block size makes of them, by hand and against brute force."""

import random

import numpy as np
import pytest

from benchmarks.study.models.prefixes import PrefixTree, block_keys, common, hit_tokens, longest_prefixes
from tests.study.requests import ask, workload


def names(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


@pytest.mark.parametrize(
    ("a", "b", "length"), [((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 3), 2), ((), (1,), 0), ((5,), (6,), 0)]
)
def test_common(a: tuple[int, ...], b: tuple[int, ...], length: int) -> None:
    assert common(names(*a), names(*b)) == length


def test_the_tree_finds_the_longest_prefix_of_any_sequence() -> None:
    draw = random.Random(0)
    tree = PrefixTree()
    before: list[list[int]] = []
    for _ in range(300):
        text = [draw.randrange(2) for _ in range(draw.randrange(1, 12))]
        longest = max((common(names(*text), names(*other)) for other in before), default=0)
        assert tree.match(names(*text)) == longest
        tree.add(names(*text))
        before.append(text)


@pytest.mark.parametrize(
    ("prefix", "block", "stride", "found"),
    [
        (300, 256, None, 256), (300, 256, 32, 300), (270, 256, 32, 256), (288, 256, 32, 288), (40, 16, None, 32),
        (31, 256, 32, 0),
    ],
)
def test_what_a_block_size_finds_of_a_prefix(prefix: int, block: int, stride: int | None, found: int) -> None:
    assert hit_tokens(prefix, block, stride) == found


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    assert longest_prefixes(workload(ask([1, 2, 3], 1), ask([1, 2, 3], 1))) == [0, 2]


def test_an_answer_is_found_but_for_its_last_token_which_has_no_kv() -> None:
    first, turn = ask([1, 2], [3, 4]), ask([1, 2, 3, 4, 5], 1)
    assert longest_prefixes(workload(first, turn)) == [0, 3]
    assert longest_prefixes(workload(first, turn), answers=False) == [0, 2]


def test_block_keys_name_whole_prefixes() -> None:
    one, other = (block_keys(names(*each), 1, 4, 2) for each in ((1, 2, 3, 4), (1, 2, 3, 5)))
    assert one[0] == other[0]
    assert one[1] != other[1]
    swapped = block_keys(names(3, 4, 1, 2), 1, 4, 2)
    assert not set(one) & set(swapped)


def test_a_name_of_many_tokens_covers_several_blocks_or_a_part_of_one() -> None:
    assert len(block_keys(names(7, 8), 512, 700, 256)) == 2
    halves = block_keys(names(7, 8), 512, 1024, 256)
    assert len(set(halves)) == 4
    assert block_keys(names(7, 9), 512, 1024, 256)[:2] == halves[:2]
    whole = block_keys(names(7, 8), 512, 1024, 1024)
    assert whole != block_keys(names(7, 9), 512, 1024, 1024)
