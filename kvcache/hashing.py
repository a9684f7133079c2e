"""Chained hashes of full blocks of tokens: the keys of the prefix index.

Imports NumPy and xxhash only. Never decides a match: the index compares the tokens themselves.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

TOKEN_DTYPE = np.dtype(np.int32)
"""The one type of token ids wherever the KV cache reads them."""

hash_run = xxhash.xxh3_64_intdigest
"""(bytes of some tokens, seed): their hash, chained to the seed, which is the hash of what precedes them."""


@lru_cache(maxsize=1024)
def salt_seed(salt: str) -> int:
    """The seed of a prompt's first block. Prompts of different salts get unrelated hashes from the first block on."""
    return hash_run(salt.encode("utf-8", "surrogatepass"))


def block_bytes(tokens: npt.NDArray[np.int32]) -> memoryview:
    """The bytes of `tokens` [tokens], without a copy.

    Raises TypeError if they are not C-contiguous int32: any other type would hash to something that no one else finds.
    """
    if tokens.dtype != TOKEN_DTYPE or not tokens.flags.c_contiguous:
        raise TypeError(f"tokens must be C-contiguous int32, not {tokens.dtype}: use np.ascontiguousarray(t, np.int32)")
    return tokens.data.cast("B") if tokens.size else memoryview(b"")


def hash_blocks(tokens: npt.NDArray[np.int32], block_size: int, salt: str = "", *, parent: int | None = None) -> list[int]:
    """Hashes every full block of `tokens` [tokens]: hash[i] = xxh3_64(block i, seed=hash[i - 1]).

    A hash so names the whole prefix that ends with its block. The first block's seed is that of `salt`, or `parent`, the
    hash of the block before `tokens`, where a sequence is hashed as it grows. A block that is not full has no hash.

    The chaining is that of vLLM and nano-vLLM. Passing the parent as the seed saves building a (parent, tokens) pair.
    """
    view = block_bytes(tokens)
    seed = salt_seed(salt) if parent is None else parent
    width = block_size * TOKEN_DTYPE.itemsize
    return [seed := hash_run(view[at : at + width], seed) for at in range(0, len(view) - width + 1, width)]
