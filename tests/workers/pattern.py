"""A pool full of one bit pattern, and what may have changed of it: the slots that sequences were given and have computed."""

import torch
from torch import Tensor

from scheduler.protocol.messages import FinishReason
from tests.workers.stepping import Lease, Stepped

NAN = 0x7FC5A3C5
"""A NaN as float32; its halves are numbers as bfloat16, and the lower one as float16."""
FINITE = 0x3D2B3D2B
"""0.04 as bfloat16 and in float32: flash-attn multiplies what it does not want by zero."""


def words(rank: Stepped) -> Tensor:
    """[page, layer, k|v, slot, words of a slot] int32, a view of the pool."""
    data = rank.pool.data
    return data.view(*data.shape[:4], -1).view(torch.int32)


def fill(rank: Stepped, pattern: int) -> None:
    words(rank).fill_(pattern)


def require_untouched(rank: Stepped, pattern: int, leases: list[Lease]) -> None:
    """Every slot but those that the leases have computed, and the scratch page, has the pattern still; of those none has.

    Who was stopped by a token may have been a step further: that has been launched before the token was known.
    """
    pool = words(rank)
    given = torch.zeros(pool.shape[0], rank.page, dtype=torch.bool)  # the scratch page is the last
    for lease in leases:
        for position in range(lease.computed):
            given[lease.pages[position // rank.page], position % rank.page] = True
    further = [
        [lease.pages[lease.computed // rank.page], lease.computed % rank.page]
        for lease in leases
        if lease.finish is FinishReason.STOP and lease.computed // rank.page < len(lease.pages)
    ]
    same = (pool == pattern).flatten(4).all(-1).all(2).all(1).cpu()
    scratch = rank.built.pages
    wrong = (~same & ~given).nonzero().tolist()
    assert [place for place in wrong if place[0] != scratch and place not in further] == [], (
        "(page, slot) written that nobody was given"
    )
    missing = (same & given).nonzero().tolist()
    assert missing == [], "(page, slot) that should have been written"
    assert [slot for page, slot in wrong if page == scratch] in ([], [0]), "padding writes to the first slot of its page"
