"""A pool full of one bit pattern, and what may have changed of it: the slots that sequences were given and have computed."""

import torch
from torch import Tensor

from scheduler.protocol.messages import FinishReason
from tests.workers.stepping import Lease, Stepped

NAN = 0x7FC5A3C5
"""A NaN as float32; its halves are numbers as bfloat16, and the lower one as float16."""
FINITE = 0x3D2B3D2B
"""0.04 as bfloat16 and in float32: flash-attn multiplies what it does not want by zero."""


def words(rank: Stepped, narrow: bool = False) -> Tensor:
    """[block, layer, k|v, slot, words of a slot] int32, a view of the pool, or of that of narrow layers."""
    pool = rank.pool
    if narrow:
        assert rank.built.narrow is not None
        pool = rank.built.narrow[0]
    return pool.data.view(*pool.data.shape[:4], -1).view(torch.int32)


def fill(rank: Stepped, pattern: int) -> None:
    words(rank).fill_(pattern)
    if rank.built.narrow is not None:
        words(rank, narrow=True).fill_(pattern)


def require_untouched(rank: Stepped, pattern: int, leases: list[Lease]) -> None:
    """Every slot but those that the leases have computed, and the scratch block, has the pattern still; of those none has.

    Who was stopped by a token may have been a step further: that has been launched before the token was known.
    """
    _require_untouched(rank, words(rank), pattern, [(lease, lease.blocks) for lease in leases])
    if rank.built.narrow is not None:
        _require_untouched(rank, words(rank, narrow=True), pattern, [(lease, rank.beside(lease.blocks)) for lease in leases])


def _require_untouched(rank: Stepped, pool: Tensor, pattern: int, leases: list[tuple[Lease, list[int]]]) -> None:
    """leases: with their blocks of this pool."""
    given = torch.zeros(pool.shape[0], rank.block, dtype=torch.bool)  # the scratch block is the last
    for lease, blocks in leases:
        for position in range(lease.computed):
            given[blocks[position // rank.block], position % rank.block] = True
    further = [
        [blocks[lease.computed // rank.block], lease.computed % rank.block]
        for lease, blocks in leases
        if lease.finish is FinishReason.STOP and lease.computed // rank.block < len(blocks)
    ]
    same = (pool == pattern).flatten(4).all(-1).all(2).all(1).cpu()
    scratch = len(pool) - 1
    wrong = (~same & ~given).nonzero().tolist()
    assert [place for place in wrong if place[0] != scratch and place not in further] == [], (
        "(block, slot) written that nobody was given"
    )
    missing = (same & given).nonzero().tolist()
    assert missing == [], "(block, slot) that should have been written"
    assert [slot for block, slot in wrong if block == scratch] in ([], [0]), "padding writes to the first slot of its block"
