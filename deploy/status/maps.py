"""Pool maps small enough to send every second: thinned out to a budget of cells, two bits a cell, base64.

Imports numpy alone.
"""

import base64
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.server.stats import PoolMap

FREE, HELD, SHARED, CACHED = range(4)
STATE_NAMES = ("free", "held", "shared", "cached")
MAX_CELLS = 1 << 18
"""Cells of all groups together: 64 KiB of states, 86 KiB as text."""

Cells = npt.NDArray[np.uint8]
_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def blocks_per_cell(pools: Sequence[PoolMap], max_cells: int = MAX_CELLS) -> int:
    """The least whole number of blocks a cell, the same for every group, that keeps within `max_cells`."""
    sizes = [len(pool.states) for pool in pools]
    blocks = max(1, math.ceil(sum(sizes) / max_cells))
    while blocks < max(sizes, default=0) and sum(math.ceil(size / blocks) for size in sizes) > max_cells:
        blocks += 1
    return blocks


def thin(states: bytes, blocks: int) -> Cells:
    """One cell for each run of `blocks` consecutive blocks: the state of one of them, always the same one.

    Which one changes from cell to cell by the golden ratio, so a map keeps the pool's proportions and shows no pattern that
    is not there; a majority would hide whatever is below half everywhere. `shown_block` names it.
    """
    every = np.frombuffer(states, dtype=np.uint8)
    cells = np.arange(math.ceil(len(every) / blocks))
    shown: Cells = every[np.minimum(shown_block(cells, blocks), len(every) - 1)]
    return shown


def shown_block(cells: npt.NDArray[np.int64], blocks: int) -> npt.NDArray[np.int64]:
    """The block whose state each cell shows, unless the pool ends before it. The page computes the same."""
    shown: npt.NDArray[np.int64] = cells * blocks + np.floor(cells * _GOLDEN % 1.0 * blocks).astype(np.int64)
    return shown


def pack(cells: Cells) -> str:
    """Four cells a byte, the first in the lowest bits; base64."""
    quads = np.pad(cells, (0, -len(cells) % 4)).reshape(-1, 4)
    return base64.b64encode((quads << _SHIFTS).sum(axis=1, dtype=np.uint8).tobytes()).decode()


def unpack(text: str, cells: int) -> Cells:
    """The inverse of `pack`."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return (packed[:, None] >> _SHIFTS & np.uint8(3)).reshape(-1)[:cells]
