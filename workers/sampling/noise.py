"""Gumbel noise as a pure function of (seed, choice, position, token id): the same whatever the batch, rank or restart.

The integer part is bit-identical on every device and in every shape; only the two logarithms belong to the device.
Imports torch and NumPy only; keeps no generator and no state.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN64 = 0x9E3779B97F4A7C15
_GOLDEN32 = 0x9E3779B1 - 2**32
_MIX1 = 0x7FEB352D
_MIX2 = 0x846CA68B - 2**32
_BITS = {torch.float32: 23, torch.float64: 32}
_PIECE = 1 << 14  # elements at a time on the CPU: temporaries stay in the cache and are not mapped afresh each time


def stream(seed: int, choice: int) -> int:
    """The noise stream of one choice of one request, uint64."""
    return int(_splitmix(_splitmix(np.array([seed], np.uint64)) + np.uint64(choice))[0])


def keys(streams: npt.NDArray[np.uint64], positions: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """One 64-bit key for each sampled position, as two int32 halves: [samples] -> [samples, 2]."""
    keyed = _splitmix(streams + positions.astype(np.uint64) * np.uint64(_GOLDEN64))
    return keyed.view(np.int32).reshape(-1, 2)


def highest(dtype: torch.dtype) -> float:
    """No `gumbel` of this dtype is above this."""
    return -math.log(-math.log1p(-0.5 * 0.5 ** _BITS[dtype]))


def gumbel(keys: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise [samples, ids] for int32 `keys` [samples, 2] and int32 token `ids` [samples, ids].

    Invariant: an element depends on its key and id alone. `dtype` is float32 (23-bit uniforms) or float64 (32-bit).
    """
    if not ids.is_cpu or ids.numel() <= _PIECE:
        return _gumbel(keys, ids, dtype)
    noise = torch.empty(ids.shape, dtype=dtype)
    rows = max(1, _PIECE // ids.shape[1])
    for row in range(0, len(ids), rows):
        some = slice(row, row + rows)
        for column in range(0, ids.shape[1], _PIECE):
            piece = slice(column, column + _PIECE)
            noise[some, piece] = _gumbel(keys[some], ids[some, piece], dtype)
    return noise


def _gumbel(keys: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    # Wellons' lowbias32, keyed twice. torch shifts arithmetically, hence the masks; int32 products wrap around.
    bits = ids * _GOLDEN32
    bits ^= keys[:, :1]
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _MIX1
    bits ^= keys[:, 1:]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _MIX2
    bits ^= (bits >> 16) & 0xFFFF
    # Half a step away from 0 and from 1, and exact in `dtype`, so both logarithms are finite.
    kept = _BITS[dtype]
    bits = bits.long() if kept == 32 else bits >> (32 - kept)
    uniform: Tensor = (bits & (2**kept - 1)).to(dtype)
    uniform += 0.5
    uniform *= 0.5**kept
    return torch.neg_(uniform.log_().neg_().log_())


def _splitmix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014) after one step of its counter."""
    mixed = state + np.uint64(_GOLDEN64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
