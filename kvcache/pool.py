"""One rank's KV pages as one tensor: per-layer views for attention, copies and whole-page bytes for everything else.

The only file of `kvcache` that imports torch. It never decides which page holds what; `table` and the scheduler do.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvcache.layout import PageLayout

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class KVPool:
    """`pages` pages of `layout` on one device, page-first (drawn in `layout`).

    On a CPU the memory is allocated, never touched: the system commits it as pages are first written, and what an unwritten
    slot holds is arbitrary, NaN included. Readers must not let such slots into a sum, not even times zero. On a GPU the pool
    starts as zeros, because flash-attn 3 multiplies the unwritten slots of a page by a zero probability.

    pinned: host memory that a GPU copies from and to by itself; locked at once, as long as the pool lives.

    Raises ValueError for fewer than one page, torch's out-of-memory error where the device cannot hold them.
    """

    def __init__(self, layout: PageLayout, pages: int, device: torch.device | str, *, pinned: bool = False) -> None:
        if pages < 1:
            raise ValueError(
                f"a KV pool of {pages} pages can serve nothing; one page takes {layout.page_bytes:,} bytes on this rank: "
                "raise kv_memory or lower block_size"
            )
        self.layout = layout
        self.pages = pages
        self.dtype = TORCH_DTYPES[layout.dtype]
        allocate = torch.zeros if torch.device(device).type == "cuda" else torch.empty
        self.data = allocate((pages, *layout.shape), dtype=self.dtype, device=device)
        """[page, layer, k|v, slot, kv_head, head_dim], contiguous"""
        self.device = self.data.device
        if pinned:
            weakref.finalize(self, _pin(self.data)).atexit = False  # the process's end frees all

    def keys(self, layer: int) -> Tensor:
        """[page, slot, kv_head, head_dim], a view; contiguous within a page, one whole page apart between pages."""
        return self.data[:, layer, 0]

    def values(self, layer: int) -> Tensor:
        """[page, slot, kv_head, head_dim], a view like `keys`."""
        return self.data[:, layer, 1]

    @property
    def rows(self) -> Tensor:
        """[page, page_bytes] uint8, all pages as `export_page` gives them, a view."""
        return self.data.view(self.pages, -1).view(torch.uint8)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` slots of page `source` to page `target`, all layers: the copy of copy-on-write.

        On the current stream, without a wait. Of part of a page that is 2 x layers runs, one kernel on a GPU all the same,
        since they lie at one distance; of a whole page it is one copy.
        """
        if not 0 <= tokens <= self.layout.page_size:
            raise ValueError(f"cannot copy {tokens} tokens of a page of {self.layout.page_size}")
        self.data[target, :, :, :tokens].copy_(self.data[source, :, :, :tokens])

    def export_page(self, page: int) -> Tensor:
        """[page_bytes] uint8, the page's own memory: valid until the page is written again, so copy it or hold the page."""
        return self.data[page].view(-1).view(torch.uint8)

    def import_page(self, page: int, content: Tensor) -> None:
        """Overwrite a page with what `export_page` gave, of this pool or of one with an equal layout, on any device."""
        if content.dtype != torch.uint8 or content.numel() != self.layout.page_bytes:
            raise ValueError(
                f"a page of this pool is {self.layout.page_bytes:,} bytes of uint8, not {content.numel():,} of "
                f"{content.dtype}: both pools must have the same page_size, layers, KV heads per rank, head_dim and dtype"
            )
        self.export_page(page).copy_(content.view(-1))


def _pin(data: Tensor) -> Callable[[], None]:
    """Registers memory with CUDA; returns what undoes it. torch's own pinned allocator takes the next power of two.

    Errors: RuntimeError where the system lets nobody lock so much memory.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, size = data.data_ptr(), data.untyped_storage().nbytes()
    if (error := int(runtime.cudaHostRegister(address, size, 0))) != 0:
        raise RuntimeError(
            f"{size:,} bytes of host memory cannot be pinned (CUDA error {error}): give the host tier less memory, or "
            "raise the limit of locked memory"
        )
    return partial(runtime.cudaHostUnregister, address)
