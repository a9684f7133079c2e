"""How a decode is cut and computed, by the pool and the size of the batch. Imports torch, triton and the pool."""

from dataclasses import dataclass, replace

import torch

from kvcache.pool import KVPool
from workers.kernels.attention.spans import fitting_keys, span_bytes
from workers.kernels.launch import fitting_stages, may_start_early


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a decode is cut and computed; no field changes what is computed beyond rounding."""

    keys: int = 64  # of a span
    stages: int = 3  # spans in flight
    warps: int = 4
    shares: int = 1  # pieces wanted for each multiprocessor
    least: int = 4  # spans of a piece, at least
    tile: int = 16  # query rows of a program, at least: heads of a KV head, times rows that share a prefix
    atomic: bool = True  # a row's last piece merges; else a kernel of its own does
    dependent: bool = False  # programmatic dependent launch: the grid may start before its predecessor's end


FEW_ROWS = 8
"""Decodes that leave most of the device idle unless their keys are cut finely, and whose launches are what they cost."""
SOME_ROWS = 64
"""Decodes too few for many programs on each multiprocessor: more of each one's spans are in flight instead."""


def choose_config(pool: KVPool, rows: int, dtype: torch.dtype, head_dim: int) -> DecodeConfig:
    """The best known for the pool's device, a batch of so many rows, and queries of that dtype; heads of more than 128 numbers
    are as yet unmeasured.

    Few: in whole steps of the 0.6B shape on an H200, us: batch 1 with 300 keys 822 as many rows have it, 751 as few have it;
    batch 4 1,262 and 1,230; batch 32 1,507 and 1,564. Some, us a layer: 32 rows of 1,024 keys 40.7 as many have it, 35.3 as
    some have it; 32 of 128 to 1,779 40.9 and 38.9, 64 of them 67.3 and 63.8; 256 254 and 256.
    """
    config = _measured(pool, rows, dtype, head_dim)
    stages = fitting_stages(config.stages, span_bytes(pool, config.keys, head_dim), pool.device)
    return replace(config, stages=stages)


def _measured(pool: KVPool, rows: int, dtype: torch.dtype, head_dim: int) -> DecodeConfig:
    """On an H200."""
    keys = fitting_keys(DecodeConfig().keys, head_dim)
    if dtype == torch.float32:
        return DecodeConfig(keys=max(16, keys // 2), stages=2, warps=8)  # a dot in full precision takes operands into registers
    hopper = may_start_early(pool.device)
    if pool.layout.scaled and hopper:
        return _of_fp8(keys, rows)
    if rows <= FEW_ROWS and hopper:
        return DecodeConfig(keys=keys, stages=4, least=2, atomic=False, dependent=True)
    return (
        DecodeConfig(keys=keys, stages=4, shares=2, dependent=True) if rows <= SOME_ROWS and hopper else DecodeConfig(keys=keys)
    )


def _of_fp8(keys: int, rows: int) -> DecodeConfig:
    """Half the bytes to a key, so twice as many keys at once where rows are few. us a layer of 8 heads of 128, two queries
    each, with `keys` and with twice as many: one row of 32,768 keys 34.1 and 23.6, 32 rows of 1,024 24.7 and 21.3, 64 ragged
    rows of at most 2,017 45.5 and 42.2, 256 ragged ones 137.7 and 140.0."""
    if rows <= FEW_ROWS:
        return DecodeConfig(keys=2 * keys, least=1, atomic=False, dependent=True)
    return DecodeConfig(keys=2 * keys, shares=2, dependent=True) if rows <= SOME_ROWS else DecodeConfig(keys=keys, stages=4)
