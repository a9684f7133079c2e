"""An inventory travels in parts of a bounded size, and what comes out is what went in."""

import msgspec
import numpy as np
import pytest

from kvcache.ids import BlockId
from kvcache.standing import Standing
from scheduler.protocol.inventory import beside_of, blocks_of, narrow_parts, parts
from scheduler.protocol.leaders import Inventory


def content(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


STANDING = [
    Standing(BlockId(5), None, "", content(1, 2, 3, 4)),
    Standing(BlockId(2), BlockId(5), "", content(5, 6, 7, 8)),
    Standing(BlockId(0), None, "tenant", content(1, 2, 3, 4)),
    Standing(BlockId(7), BlockId(2), "", content(9)),
    Standing(BlockId(3), None, "tenant", content(4, 4, 4)),
]


@pytest.mark.parametrize("most_bytes", [1, 32, 1 << 20])
def test_what_comes_out_is_what_went_in(most_bytes: int) -> None:
    told = parts(STANDING, most_bytes)
    assert all(len(part.tokens) <= max(most_bytes, 16) for part in told)
    assert len(told) == {1: 5, 32: 2, 1 << 20: 1}[most_bytes]
    wire = [msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=Inventory) for part in told]
    assert list(blocks_of(wire)) == STANDING
    assert parts([]) == []


def test_what_stands_in_host_memory_is_told_apart() -> None:
    told = [*parts(STANDING[:2]), *parts(STANDING[2:3], host=True)]
    assert list(blocks_of(told)) == STANDING[:2]
    assert list(blocks_of(told, host=True)) == STANDING[2:3]


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": content(1)}, {"before": content(-1)}, {"counts": content(4)}, {"tokens": content(1)}, {"salts": ()},
        {"counts": content(4, 4, 4, 2, 3)}, {"counts": content(4, 4, 4, 5, -1)}, {"counts": content(4, 4, 4, 4, 0)},
    ],
)  # fmt: skip
def test_buffers_that_do_not_agree_are_refused(change: dict[str, bytes]) -> None:
    (part,) = parts(STANDING)
    with pytest.raises(ValueError, match="an inventory"):
        list(blocks_of([msgspec.structs.replace(part, **change)]))


def test_what_narrow_layers_have_is_told_beside_the_others() -> None:
    pairs = [(BlockId(block), BlockId(9 - block)) for block in range(5)]
    told = [*parts([Standing(BlockId(7), None, "", content(1, 2))]), *narrow_parts(pairs, 16)]
    assert len(told) == 4
    told = [msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=Inventory) for part in told]
    assert list(beside_of(told)) == pairs
    assert [standing.block for standing in blocks_of(told)] == [7]
    assert not list(blocks_of(told, host=True))
