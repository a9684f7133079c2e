"""Writing a step's new keys and values into the pool with torch's index operations, on any device.

Imports torch and the pool. Backends with a fused kernel of their own do not need it, but for what FP8 makes of a number.
"""

from typing import Protocol

import torch
from torch import Tensor

from kvcache.pool import KVPool


class KvWriter(Protocol):
    """Writes a step's KV. `targets` turns the step's slots into what `write` wants, once for all layers."""

    def targets(self, slots: Tensor) -> Tensor: ...

    def write(self, layer: int, key: Tensor, value: Tensor, targets: Tensor) -> None:
        """key, value [tokens, kv_heads, head_dim]; targets [tokens] int64."""
        ...


def stored(states: Tensor, scale: float) -> Tensor:
    """Keys or values as a pool in FP8 has them: divided by their scale, in float32, and rounded to the nearest number of
    float8_e4m3fn, or to its largest (448) beyond that. NaN stays NaN. The kernels do the same (`workers.kernels.heads.fp8`)."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (states.float() / scale).clamp_(-largest, largest).to(torch.float8_e4m3fn)


class TorchWriter:
    """The pool seen as one list of [kv_heads, head_dim]: one slot of one layer's keys or values each.

    A slot's place in it differs between layers and k|v by a constant only. So the places of a step are computed once, and
    each layer's view of the pool begins at its own constant.
    """

    def __init__(self, pool: KVPool) -> None:
        layout = pool.layout
        self._block_size = layout.block_size
        self._block_places = layout.layers * 2 * layout.block_size
        self._scales = [pool.scales(layer) for layer in range(layout.layers)]
        numbers = pool.data.view(torch.uint8) if layout.scaled else pool.data  # torch places no FP8 by index
        flat = numbers.view(-1, layout.kv_heads, layout.head_dim)
        starts = range(0, self._block_places, 2 * layout.block_size)
        self._keys = [flat[start:] for start in starts]
        self._values = [flat[start + layout.block_size :] for start in starts]

    def targets(self, slots: Tensor) -> Tensor:
        """slots [tokens] int64 -> [tokens] int64, for `write`."""
        return slots + slots.div(self._block_size, rounding_mode="floor") * (self._block_places - self._block_size)

    def write(self, layer: int, key: Tensor, value: Tensor, targets: Tensor) -> None:
        """key, value [tokens, kv_heads, head_dim]."""
        if (scales := self._scales[layer]) is not None:
            key, value = (stored(part, scale).view(torch.uint8) for part, scale in zip((key, value), scales, strict=True))
        self._keys[layer].index_copy_(0, targets, key)
        self._values[layer].index_copy_(0, targets, value)


def dense_rows(tensor: Tensor) -> Tensor:
    """[tokens, heads, head_dim] with each token's numbers in one run; tokens may lie apart, as in a fused projection."""
    heads, dim = tensor.shape[1:]
    return tensor if tensor.stride(2) == 1 and (heads == 1 or tensor.stride(1) == dim) else tensor.contiguous()
