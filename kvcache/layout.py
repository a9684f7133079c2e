"""Shapes and bytes of one rank's KV pages. Pure arithmetic: `pool` allocates them, the scheduler only counts them.

Imports nothing but the standard library; never imports torch.
"""

import math
from dataclasses import dataclass

MIN_PAGE_SIZE = 16
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class PageLayout:
    """One rank's shard of a page: `page_size` tokens of every layer, in one contiguous run of bytes.

        page 0                                                    page 1
        ├─ layer 0 ─────────────────────┬─ layer 1 ──────┬─ ... ─┤├─ layer 0 ── ...
        ├─ keys ────────┬─ values ──────┼─ keys ─┬─ ...  │       ││
        │ slot 0 … slot S-1             │                │       ││
        │   └ [kv_head 0: head_dim numbers][kv_head 1: ...]

        [page, layer, k|v, slot, kv_head, head_dim], row-major

    A whole page is copied, offloaded or sent in one operation. The first n tokens of a page are 2 x layers runs, since
    slots lie inside k|v. The attention kernels of one layer see [page, slot, kv_head, head_dim] with a long page stride.

    kv_heads: of this rank. dtype: a key of DTYPE_BYTES. Raises ValueError for sizes that no backend could serve.
    """

    page_size: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.page_size < MIN_PAGE_SIZE or self.page_size.bit_count() != 1:
            raise ValueError(
                f"page_size {self.page_size} is not possible: choose a power of two from {MIN_PAGE_SIZE} up "
                "(16, 32, 64, 128, 256, 512, ...; 256 is the default)"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not supported: choose one of {', '.join(DTYPE_BYTES)}")
        if min(self.layers, self.kv_heads, self.head_dim) < 1:
            raise ValueError(
                f"layers {self.layers}, kv_heads {self.kv_heads} and head_dim {self.head_dim} must all be at least 1"
            )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[layer, k|v, slot, kv_head, head_dim] of one page."""
        return self.layers, 2, self.page_size, self.kv_heads, self.head_dim

    @property
    def page_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers, this rank."""
        return self.page_bytes // self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens of one sequence."""
        return -(-tokens // self.page_size)

    def pages_in(self, memory_bytes: int) -> int:
        """Whole pages that fit into so much memory, at least 1. Raises ValueError where not even one does."""
        pages = memory_bytes // self.page_bytes
        if pages < 1:
            raise ValueError(
                f"{memory_bytes:,} bytes of KV memory hold no page: one page of {self.page_size} tokens takes "
                f"{self.page_bytes:,} bytes on this rank: raise kv_memory or lower block_size"
            )
        return pages
