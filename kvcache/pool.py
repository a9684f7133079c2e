"""One rank's KV blocks as one tensor: per-layer views for attention, copies and whole-block bytes for everything else.

The only file of `kvcache` that imports torch. It never decides which block holds what; `table` and the scheduler do.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvcache.layout import FP8, BlockLayout, KVScales, LayerKinds

TORCH_DTYPES = {
    FP8: torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class KVPool:
    """`blocks` blocks of `layout` on one device, block-first (drawn in `layout`).

    On a CPU the memory is allocated, never touched: the system commits it as blocks are first written, and what an unwritten
    slot holds is arbitrary, NaN included. Readers must not let such slots into a sum, not even times zero. On a GPU the pool
    starts as zeros, and whatever is written as a value is finite, because flash-attn 3 multiplies the unwritten slots of a
    block by a zero probability.

    pinned: host memory that a GPU copies from and to by itself; locked at once, as long as the pool lives. scales: of a layout
    that is `scaled`; None: 1 everywhere. Bytes that move between pools of one layout are taken as they are: all pools of a
    model have the same scales.

    Raises torch's out-of-memory error where the device cannot hold them.
    """

    def __init__(
        self, layout: BlockLayout, blocks: int, device: torch.device | str, *, pinned: bool = False,
        scales: KVScales | None = None,
    ) -> None:  # fmt: skip
        self.layout = layout
        self._scales = (scales or KVScales.ones(layout.layers)) if layout.scaled else None
        self.blocks = blocks
        self.dtype = TORCH_DTYPES[layout.dtype]
        allocate = torch.zeros if torch.device(device).type == "cuda" else torch.empty
        self.data = allocate((blocks, *layout.shape), dtype=self.dtype, device=device)
        """[block, layer, k|v, slot, kv_head, head_dim], contiguous"""
        self.device = self.data.device
        if pinned:
            weakref.finalize(self, _pin(self.data)).atexit = False  # the process's end frees all

    def keys(self, layer: int) -> Tensor:
        """[block, slot, kv_head, head_dim], a view; contiguous within a block, one whole block apart between blocks."""
        return self.data[:, layer, 0]

    def values(self, layer: int) -> Tensor:
        """[block, slot, kv_head, head_dim], a view like `keys`."""
        return self.data[:, layer, 1]

    def scales(self, layer: int) -> tuple[float, float] | None:
        """What the layer's keys and its values are multiplied by when they are read; None where they are stored as they are."""
        return None if self._scales is None else (self._scales.keys[layer], self._scales.values[layer])

    @property
    def raw(self) -> Tensor:
        """[block, block_bytes] uint8, all blocks as they lie in memory, a view."""
        return self.data.view(self.blocks, -1).view(torch.uint8)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` slots of block `source` to block `target`, all layers: the copy of copy-on-write.

        On the current stream, without a wait. Of part of a block that is 2 x layers runs, one kernel on a GPU all the same,
        since they lie at one distance; of a whole block it is one copy.
        """
        self.data[target, :, :, :tokens].copy_(self.data[source, :, :, :tokens])


class KVPools:
    """A rank's blocks of both kinds of layer, where narrow ones stand beside others that see all: keys, values and scales by a
    layer's number in the model."""

    def __init__(self, full: KVPool, narrow: KVPool, kinds: LayerKinds) -> None:
        self.full, self.narrow, self.kinds = full, narrow, kinds
        self._places = [(narrow if is_narrow else full, at) for is_narrow, at in zip(kinds.narrow, kinds.places, strict=True)]

    def keys(self, layer: int) -> Tensor:
        """As of `KVPool`, in the pool of the layer's kind."""
        pool, place = self._places[layer]
        return pool.keys(place)

    def values(self, layer: int) -> Tensor:
        """As of `KVPool`."""
        pool, place = self._places[layer]
        return pool.values(place)

    def scales(self, layer: int) -> tuple[float, float] | None:
        """As of `KVPool`."""
        pool, place = self._places[layer]
        return pool.scales(place)


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
