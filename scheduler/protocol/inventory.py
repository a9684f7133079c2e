"""What stands in a group's pool, in the parts in which its leader tells a scheduler that is new to it.

Imports `leaders`, NumPy and `kvcache.standing`.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from kvcache.hashing import TOKEN_DTYPE
from kvcache.ids import BlockId
from kvcache.standing import Standing
from scheduler.protocol.leaders import Inventory

MAX_PART_BYTES = 1 << 20
"""Of tokens in one message: neither side ever has a second copy of it all, and a beat gets through between two of them."""


def parts(standing: Iterable[Standing], most_bytes: int = MAX_PART_BYTES, *, host: bool = False) -> list[Inventory]:
    """The same blocks in the same order. most_bytes: of tokens in each, but for one block at least. host: in host memory."""
    made: list[Inventory] = []
    part: list[Standing] = []
    size = 0
    for block in standing:
        if part and size + len(block.content) > most_bytes:
            made.append(_part(part, host))
            part, size = [], 0
        part.append(block)
        size += len(block.content)
    return [*made, _part(part, host)] if part else made


def _part(standing: list[Standing], host: bool) -> Inventory:
    salts: dict[str, int] = {}
    before = [
        block.before if block.before is not None else -1 - salts.setdefault(block.salt, len(salts)) for block in standing
    ]
    return Inventory(
        blocks=np.array([block.block for block in standing], np.int32).tobytes(),
        before=np.array(before, np.int32).tobytes(),
        counts=np.array([len(block.content) // TOKEN_DTYPE.itemsize for block in standing], np.int32).tobytes(),
        tokens=b"".join(block.content for block in standing),
        salts=tuple(salts),
        host=host,
    )


def narrow_parts(pairs: list[tuple[BlockId, BlockId]], most_bytes: int = MAX_PART_BYTES) -> list[Inventory]:
    """Blocks of narrow layers, each with the block beside which it stands, in the same order."""
    most = max(1, most_bytes // (2 * TOKEN_DTYPE.itemsize))
    return [
        Inventory(
            blocks=np.array([block for block, _ in some], np.int32).tobytes(),
            before=np.array([other for _, other in some], np.int32).tobytes(), counts=b"", tokens=b"", narrow=True,
        )
        for some in (pairs[at : at + most] for at in range(0, len(pairs), most))
    ]  # fmt: skip


def beside_of(told: Iterable[Inventory]) -> Iterator[tuple[BlockId, BlockId]]:
    """What `narrow_parts` was given. Errors: ValueError for buffers that do not agree."""
    for part in told:
        if part.narrow:
            blocks, others = (np.frombuffer(column, np.int32).tolist() for column in (part.blocks, part.before))
            yield from zip(map(BlockId, blocks), map(BlockId, others), strict=True)


def blocks_of(told: Iterable[Inventory], *, host: bool = False) -> Iterator[Standing]:
    """Those of the pool, or those in host memory. Errors: ValueError for buffers that do not agree."""
    for part in told:
        if part.host != host or part.narrow:
            continue
        columns = (part.blocks, part.before, part.counts)
        blocks, before, counts = (np.frombuffer(column, np.int32).tolist() for column in columns)
        if not len(blocks) == len(before) == len(counts) or min(before, default=0) < -len(part.salts):
            raise ValueError("an inventory's parts do not agree with each other")
        if sum(counts) * TOKEN_DTYPE.itemsize != len(part.tokens) or min(counts, default=1) < 1:
            raise ValueError("an inventory has other tokens than it says")
        at = 0
        for block, above, count in zip(blocks, before, counts, strict=True):
            content = part.tokens[at : at + count * TOKEN_DTYPE.itemsize]
            at += len(content)
            if above < 0:
                yield Standing(BlockId(block), None, part.salts[-1 - above], content)
            else:
                yield Standing(BlockId(block), BlockId(above), "", content)
