"""Chained page hashes."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvcache.hashing import hash_pages, salt_seed

PAGE_SIZES = [16, 32, 64, 128, 256]


def prompt(length: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.random.default_rng(seed).integers(0, 150_000, length, dtype=np.int32)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_each_hash_is_seeded_with_the_one_before(page_size: int) -> None:
    tokens = prompt(3 * page_size + 5)
    expected = []
    seed = salt_seed("")
    for page in range(3):
        seed = xxhash.xxh3_64(tokens[page * page_size : (page + 1) * page_size].tobytes(), seed=seed).intdigest()
        expected.append(seed)
    assert hash_pages(tokens, page_size) == expected


@pytest.mark.parametrize(("length", "pages"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2)])
def test_only_full_pages_are_hashed(length: int, pages: int) -> None:
    assert len(hash_pages(prompt(length), 16)) == pages


@given(pages=st.integers(0, 6), cut=st.integers(0, 6), salt=st.sampled_from(["", "tenant", "\ud800"]))
def test_hashing_in_two_parts_is_hashing_at_once(pages: int, cut: int, salt: str) -> None:
    tokens = prompt(16 * pages + 3)
    whole = hash_pages(tokens, 16, salt)
    first = hash_pages(tokens[: 16 * cut], 16, salt)
    parent = first[-1] if first else None
    assert first + hash_pages(tokens[16 * len(first) :], 16, salt, parent=parent) == whole


def test_a_parent_of_zero_is_a_parent() -> None:
    assert hash_pages(prompt(16), 16, parent=0) != hash_pages(prompt(16), 16)


def test_a_change_reaches_every_later_page_and_no_earlier_one() -> None:
    tokens = prompt(64)
    changed = tokens.copy()
    changed[20] += 1
    before, after = hash_pages(tokens, 16), hash_pages(changed, 16)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]


def test_salts_share_no_hash() -> None:
    assert not set(hash_pages(prompt(64), 16, "a")) & set(hash_pages(prompt(64), 16, "b"))


def test_other_types_and_strides_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        hash_pages(prompt(32).astype(np.int64), 16)
    with pytest.raises(TypeError, match="C-contiguous"):
        hash_pages(prompt(64)[::2], 16)


def test_a_view_and_a_read_only_array_hash_like_a_copy() -> None:
    tokens = prompt(64)
    tokens.flags.writeable = False
    assert hash_pages(tokens[16:], 16) == hash_pages(tokens[16:].copy(), 16)
