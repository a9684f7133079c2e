"""Chained block hashes."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvcache.hashing import hash_blocks, salt_seed

BLOCK_SIZES = [16, 32, 64, 128, 256]


def prompt(length: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.random.default_rng(seed).integers(0, 150_000, length, dtype=np.int32)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_each_hash_is_seeded_with_the_one_before(block_size: int) -> None:
    tokens = prompt(3 * block_size + 5)
    expected = []
    seed = salt_seed("")
    for block in range(3):
        seed = xxhash.xxh3_64(tokens[block * block_size : (block + 1) * block_size].tobytes(), seed=seed).intdigest()
        expected.append(seed)
    assert hash_blocks(tokens, block_size) == expected


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2)])
def test_only_full_blocks_are_hashed(length: int, blocks: int) -> None:
    assert len(hash_blocks(prompt(length), 16)) == blocks


@given(blocks=st.integers(0, 6), cut=st.integers(0, 6), salt=st.sampled_from(["", "tenant", "\ud800"]))
def test_hashing_in_two_parts_is_hashing_at_once(blocks: int, cut: int, salt: str) -> None:
    tokens = prompt(16 * blocks + 3)
    whole = hash_blocks(tokens, 16, salt)
    first = hash_blocks(tokens[: 16 * cut], 16, salt)
    parent = first[-1] if first else None
    assert first + hash_blocks(tokens[16 * len(first) :], 16, salt, parent=parent) == whole


def test_a_parent_of_zero_is_a_parent() -> None:
    assert hash_blocks(prompt(16), 16, parent=0) != hash_blocks(prompt(16), 16)


def test_a_change_reaches_every_later_block_and_no_earlier_one() -> None:
    tokens = prompt(64)
    changed = tokens.copy()
    changed[20] += 1
    before, after = hash_blocks(tokens, 16), hash_blocks(changed, 16)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]


def test_salts_share_no_hash() -> None:
    assert not set(hash_blocks(prompt(64), 16, "a")) & set(hash_blocks(prompt(64), 16, "b"))


def test_other_types_and_strides_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        hash_blocks(prompt(32).astype(np.int64), 16)
    with pytest.raises(TypeError, match="C-contiguous"):
        hash_blocks(prompt(64)[::2], 16)


def test_a_view_and_a_read_only_array_hash_like_a_copy() -> None:
    tokens = prompt(64)
    tokens.flags.writeable = False
    assert hash_blocks(tokens[16:], 16) == hash_blocks(tokens[16:].copy(), 16)
