"""The resident batch on the device: host edits are scattered into it, a decode step's inputs are gathered from it, and the
tokens of a step are told to the host.

Triton; on the CPU under its interpreter. Beside each kernel its reference in torch stands in the tests.
"""

import triton
import triton.language as tl
from torch import Tensor

EDITS_A_PROGRAM = 256
TOLD_BY_A_PROGRAM = 256


@triton.jit(do_not_specialize=["count"])
def _scatter(state, edits, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    place = tl.load(edits + at, mask=mask, other=0)
    tl.store(state + place, tl.load(edits + count + at, mask=mask, other=0), mask=mask)


def scatter(state: Tensor, edits: Tensor, count: int) -> None:
    """state[edits[i]] = edits[count + i] for i < count. state: [words] int32. edits: [2 * count or more] int32.

    Places that stand twice must bring the same value.
    """
    _scatter[(triton.cdiv(count, EDITS_A_PROGRAM),)](state, edits, count, BLOCK=EDITS_A_PROGRAM)


@triton.jit(do_not_specialize=["tokens", "host", "count"])
def _tell(tokens, host, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(host + at, tl.load(tokens + at, mask=at < count), mask=at < count)


def tell(tokens: Tensor, host: Tensor) -> None:
    """tokens [n] int32 -> the first n of host, int32 in pinned memory; seen there once what follows on the stream has ended.

    A copy would do the same, behind whatever else is on its way to the host: the blocks of an offload, for one.
    """
    count = len(tokens)
    _tell[(triton.cdiv(count, TOLD_BY_A_PROGRAM),)](tokens, host, count, BLOCK=TOLD_BY_A_PROGRAM)


@triton.jit
def _gather(order, last_token, position, tables, tokens, positions, slots, contexts, step_tables, scratch, width,
            narrow_tables, narrow_slots, narrow_step_tables, KV_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
            NARROW: tl.constexpr):  # fmt: skip
    """One program is one sequence of the step."""
    i = tl.program_id(0)
    row = tl.load(order + i).to(tl.int64)
    at = tl.load(position + row)
    block = tl.load(tables + row * width + at // KV_BLOCK)
    tl.store(tokens + i, tl.load(last_token + row))
    tl.store(positions + i, at)
    tl.store(slots + i, block.to(tl.int64) * KV_BLOCK + at % KV_BLOCK)
    tl.store(contexts + i, at + 1)
    held = at // KV_BLOCK + 1
    for first in range(0, held, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        mask = entry < held
        tl.store(step_tables + i.to(tl.int64) * width + entry, tl.load(tables + row * width + entry, mask=mask), mask=mask)
        if NARROW:
            ids = tl.load(narrow_tables + row * width + entry, mask=mask)
            tl.store(narrow_step_tables + i.to(tl.int64) * width + entry, ids, mask=mask)
    if NARROW:
        narrow = tl.load(narrow_tables + row * width + at // KV_BLOCK)
        tl.store(narrow_slots + i, narrow.to(tl.int64) * KV_BLOCK + at % KV_BLOCK)
    tl.store(position + row, tl.where(row == scratch, at, at + 1))


def gather(
    order: Tensor,
    last_token: Tensor,
    position: Tensor,
    tables: Tensor,
    *,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    contexts: Tensor,
    step_tables: Tensor,
    block_size: int,
    batch: int,
    narrow: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """The inputs of a decode step of `batch` sequences; each row of it but the last (padding) moves on by one position.

    order: [batch or more] int32 rows of the step. last_token, position: [rows + 1] int32. tables: [rows + 1, blocks] int32.
    Written: tokens, positions, contexts [batch] int32, slots [batch] int64, and of step_tables [batch, blocks] int32 as much as
    each sequence holds: so the cost does not depend on the width. narrow: tables, slots and step_tables of narrow layers, where
    these have their own.
    """
    _gather[(batch,)](
        order, last_token, position, tables, tokens, positions, slots, contexts, step_tables, last_token.shape[0] - 1,
        tables.shape[1], *(narrow or (None, None, None)), KV_BLOCK=block_size, BLOCK=32, NARROW=narrow is not None,
    )  # fmt: skip
