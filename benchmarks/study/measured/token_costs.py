"""What a reused token costs the scheduler and the worker: hashed, verified, published, copied where part of a block is shared.

Pure Python and NumPy but for the copies, which need torch.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.study.options import Options, in_turns, spread
from kvcache.hashing import hash_blocks
from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler.config.core import CoreConfig

TOKENS = 16_384
BLOCKS = (16, 64, 256)
PARTS = 1000


def bookkeeping_ns(options: Options) -> dict[str, dict[str, float]]:
    """Block size -> nanoseconds a token: hashing a prompt; finding all of it and comparing every token; publishing it."""
    tokens = np.random.default_rng(options.seed).integers(0, 1 << 17, TOKENS).astype(np.int32)
    return {str(block): _of_block(tokens, block, options) for block in BLOCKS}


def _of_block(tokens: npt.NDArray[np.int32], block: int, options: Options) -> dict[str, float]:
    hashes = hash_blocks(tokens, block)
    tables: list[BlockTable] = []

    def publish() -> None:
        """Into an empty table: reserving, adding a node and a block for each block."""
        table, group = BlockTable(block, CoreConfig(block_size=block).stride), GroupId(0)
        table.add_group(group, len(hashes))
        held = table.reserve(group, table.index.match(tokens, hashes, "", 0), 0, len(hashes), "")
        assert held is not None
        for at, hash_ in enumerate(hashes):
            table.publish(held, tokens[at * block : (at + 1) * block].tobytes(), hash_)
        tables[:] = [table]

    def find_part() -> None:
        """The prompt again, but that its last block is wanted to one token less than all: found inside it, many times."""
        match = tables[0].index.match(tokens, hashes, "", len(hashes) - 1)
        for _ in range(PARTS):
            found = tables[0].index.parts(match, tokens, "", TOKENS - 1)[GroupId(0)]
        assert found.tokens == block - 1

    publish()
    work: dict[str, Callable[[], object]] = {
        "hash": lambda: hash_blocks(tokens, block),
        "verify": lambda: tables[0].index.match(tokens, hashes, "", len(hashes)),
        "verify and find parts": find_part,
        "publish": publish,
    }
    times = in_turns(work, options.rounds, repeat=2 if options.quick else 20)
    middle = {name: statistics.median(each) for name, each in times.items()}
    result = {name: float(f"{middle[name] * 1e9 / TOKENS:.3g}") for name in ("hash", "verify", "publish")}
    return result | {"part_us": float(f"{(middle['verify and find parts'] - middle['verify']) * 1e6 / PARTS:.3g}")}


def copy_us(options: Options, shapes: tuple[str, ...] = ("0.1B", "0.6B")) -> dict[str, Any]:
    """Shape -> microseconds of copying the first 32 and 128 tokens of a block to another, and bytes of KV a token."""
    import torch

    from benchmarks.shared.checkpoints import SHAPES
    from kvcache.layout import BlockLayout
    from kvcache.pool import KVPool

    settle: Callable[[], object] = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    result: dict[str, Any] = {}
    for name in shapes:
        shape = SHAPES[name]
        layout = BlockLayout(256, shape.layers, shape.kv_heads, shape.head_dim, "bfloat16")
        pool = KVPool(layout, 16, options.device)
        pool.data.zero_()
        work: dict[str, Callable[[], object]] = {str(tokens): partial(pool.copy, 0, 9, tokens) for tokens in (32, 128)}
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        times = in_turns(work, options.rounds, repeat=20, settle=settle, clock=clock)
        result[name] = {"token_bytes": layout.token_bytes, "us": {key: spread(each, 1e6) for key, each in times.items()}}
    return result
