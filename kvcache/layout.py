"""Shapes and bytes of one rank's KV blocks. Pure arithmetic: `pool` allocates them, the scheduler only counts them.

Imports nothing but the standard library; never imports torch.
"""

import math
from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple

FP8 = "float8_e4m3fn"
DTYPE_BYTES = {FP8: 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class KVScales:
    """Of each layer, what its stored keys and its stored values are multiplied by to be read: they were divided by it."""

    keys: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def ones(cls, layers: int) -> "KVScales":
        return cls((1.0,) * layers, (1.0,) * layers)

    def of(self, layers: list[int]) -> "KVScales":
        """Those of some layers, in that order."""
        return KVScales(tuple(self.keys[layer] for layer in layers), tuple(self.values[layer] for layer in layers))


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """Which layers of a model are narrow: they see a window, beside others that see all. narrow: [layers]."""

    narrow: tuple[bool, ...]

    def layers(self, narrow: bool) -> list[int]:
        """Those of a kind."""
        return list(compress(range(len(self.narrow)), (each == narrow for each in self.narrow)))

    @property
    def places(self) -> list[int]:
        """[layers] each one's number among those of its kind."""
        return [self.narrow[:layer].count(narrow) for layer, narrow in enumerate(self.narrow)]


class PoolSizes(NamedTuple):
    """Blocks of a pool, and of that of narrow layers beside it; 0 where there are none."""

    blocks: int
    narrow: int = 0


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One rank's shard of a block: `block_size` tokens of every layer, in one contiguous run of bytes.

        block 0                                                    block 1
        ├─ layer 0 ─────────────────────┬─ layer 1 ──────┬─ ... ─┤├─ layer 0 ── ...
        ├─ keys ────────┬─ values ──────┼─ keys ─┬─ ...  │       ││
        │ slot 0 … slot S-1             │                │       ││
        │   └ [kv_head 0: head_dim numbers][kv_head 1: ...]

        [block, layer, k|v, slot, kv_head, head_dim], row-major

    A whole block is copied, offloaded or sent in one operation. The first n tokens of a block are 2 x layers runs, since
    slots lie inside k|v. The attention kernels of one layer see [block, slot, kv_head, head_dim] with a long block stride.

    kv_heads: of this rank. dtype: of the stored numbers, a key of DTYPE_BYTES; FP8 is narrower than what the model computes
    in. Raises ValueError for another.
    """

    block_size: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not supported: choose one of {', '.join(DTYPE_BYTES)}")

    def of_kind(self, kinds: LayerKinds, narrow: bool) -> "BlockLayout":
        """Of blocks of these layers alone."""
        return replace(self, layers=len(kinds.layers(narrow)))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[layer, k|v, slot, kv_head, head_dim] of one block."""
        return self.layers, 2, self.block_size, self.kv_heads, self.head_dim

    @property
    def scaled(self) -> bool:
        """Whether a stored number is a key or a value only once it is multiplied by its layer's scale."""
        return self.dtype == FP8

    @property
    def block_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers, this rank."""
        return self.block_bytes // self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one sequence."""
        return -(-tokens // self.block_size)

    def blocks_in(self, memory_bytes: int) -> int:
        """Whole blocks that fit into so much memory, at least 1. Raises ValueError where not even one does."""
        blocks = memory_bytes // self.block_bytes
        if blocks < 1:
            raise ValueError(
                f"{memory_bytes:,} bytes of KV memory hold no block: one block of {self.block_size} tokens takes "
                f"{self.block_bytes:,} bytes on this rank: raise kv_memory or lower block_size"
            )
        return blocks


def divide(
    memory_bytes: int, block_bytes: int, narrow_bytes: int, *, longest: int, rows: int, at_rest: int, at_once: int
) -> PoolSizes:  # fmt: skip
    """Memory for blocks of both kinds of layer. block_bytes, narrow_bytes: of a block of those that see all, of a narrow one.

    longest: blocks of the longest sequence. rows: sequences at once. at_rest, at_once: narrow blocks that one holds while it
    decodes, and at most. Both kinds run out together where sequences are of middle length, the geometric mean of the longest
    (for which there is room with as many of both) and of one that holds as many of both, and half of them are prompts. Narrow
    blocks are one sequence's at least, and never more than the others, beside each of which one stands. What the others cannot
    use is theirs, too. Where memory is short there are as many of both. The longest sequence has room where that takes no more
    than half of the narrow blocks away.
    Raises ValueError where not even one of both fits.
    """
    both = memory_bytes // (block_bytes + narrow_bytes)
    if both < 1:
        raise ValueError(
            f"{memory_bytes:,} bytes of KV memory hold no block: one takes {block_bytes + narrow_bytes:,} bytes on this rank: "
            "raise kv_memory or lower block_size"
        )
    longest_here, most = min(longest, both), min(longest, both, at_once)
    beside = (min(at_rest, most) + most) / 2 / math.sqrt(longest_here * most)  # narrow blocks for each of the others
    narrow = min(both, max(most, round(beside * memory_bytes / (block_bytes + beside * narrow_bytes))))
    beside_longest = (memory_bytes - longest * block_bytes) // narrow_bytes
    if beside_longest >= max(most, narrow / 2):
        narrow = min(narrow, beside_longest)
    blocks = min((memory_bytes - narrow * narrow_bytes) // block_bytes, rows * longest)
    if narrow < min(longest, at_once):  # then none may be longer than what there are narrow blocks for
        blocks = min(blocks, narrow)
    return PoolSizes(blocks, min(blocks, (memory_bytes - blocks * block_bytes) // narrow_bytes))
