"""Spans of a row's keys, as decodes and chunks read them from the pool, and the online softmax over them. Imports triton and
the pool.

What a layer's `Form` adds to plain attention is constants of a kernel, 0 where it adds nothing: then nothing of it is compiled.
"""

import triton
import triton.language as tl

from kvcache.pool import KVPool

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


def fitting_keys(keys: int, head_dim: int) -> int:
    """Of a span, where so many fit whose heads have 128 numbers or fewer: several spans lie in a multiprocessor at once."""
    width = int(triton.next_power_of_2(head_dim))
    return max(16, keys // max(1, width // 128))


def span_bytes(pool: KVPool, keys: int, head_dim: int) -> int:
    """Of the keys and values of a span."""
    return 2 * keys * max(16, int(triton.next_power_of_2(head_dim))) * pool.data.element_size()


@triton.jit
def lowest_seen(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that a token at `position`, or tokens at these, sees."""
    lowest = position * 0
    if WINDOW > 0:
        lowest = tl.maximum(lowest, position - (WINDOW - 1))
    if CHUNK > 0:
        lowest = tl.maximum(lowest, position // CHUNK * CHUNK)
    return lowest


@triton.jit
def span_blocks(table, span, lowest, context, KV_BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The span's block id, or [KEYS] block ids where a span is longer than a block; 0 past the context, and before the block
    of `lowest`, whose id may name what is another's by now. lowest: None where all that came before is seen."""
    if KEYS <= KV_BLOCK:
        blocks = tl.load(table + span * KEYS // KV_BLOCK)
    else:
        position = span * KEYS + tl.arange(0, KEYS)
        held = position < context
        if lowest is not None:
            held = held & (position >= lowest // KV_BLOCK * KV_BLOCK)
        blocks = tl.load(table + position // KV_BLOCK, mask=held, other=0)
    return blocks


@triton.jit
def span_kv(pool, block, span, base, head, lowest, context, dims, DIM: tl.constexpr,
           ROW: tl.constexpr, KV_BLOCK: tl.constexpr, KV_BLOCK_ROWS: tl.constexpr, KEYS: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """Keys and values [KEYS, BLOCK_DIM] of one span. Values past the context, and before `lowest` where that is not None, are
    zeros where MASKED; keys are anything.

    base: the layer's first row in a block, in rows of ROW numbers, of which its heads fill all or the beginning; its values
    stand KV_BLOCK rows behind its keys.
    """
    BLOCK_DIM: tl.constexpr = dims.shape[0]
    step = tl.arange(0, KEYS)
    written = span * KEYS + step < context
    if lowest is not None:
        written = written & (span * KEYS + step >= lowest)
    if KEYS <= KV_BLOCK:
        start = pool + (block.to(tl.int64) * KV_BLOCK_ROWS + base + span * KEYS % KV_BLOCK) * ROW + head * DIM
        at = start + (step * ROW)[:, None] + dims[None, :]
    else:
        place = block.to(tl.int64) * KV_BLOCK_ROWS + base + (span * KEYS + step) % KV_BLOCK
        at = pool + (place * ROW)[:, None] + (head * DIM + dims)[None, :]
    inside = (dims < DIM)[None, :]
    if DIM != BLOCK_DIM:
        k = tl.load(at, mask=inside, other=0.0)
        v = tl.load(at + KV_BLOCK * ROW, mask=written[:, None] & inside, other=0.0)
    elif MASKED:
        k = tl.load(at)
        v = tl.load(at + KV_BLOCK * ROW, mask=written[:, None], other=0.0)
    else:
        k = tl.load(at)
        v = tl.load(at + KV_BLOCK * ROW)
    return k, v


@triton.jit
def capped(scores, SOFTCAP: tl.constexpr):
    """Scores in base 2, through SOFTCAP * tanh(score / SOFTCAP) in base e."""
    BOUND: tl.constexpr = SOFTCAP * _LOG2_E
    return BOUND - 2 * BOUND / (tl.exp2(tl.minimum(scores * (2 / SOFTCAP), 64.0)) + 1)  # 64: where it has long been BOUND


@triton.jit
def fold(q, k, v, span, lowest, context, top, weight, acc, scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """One span into the online softmax, in base 2. lowest: None where all that came before is seen. Keys and values of a pool
    in FP8 are exact in the query's dtype."""
    KEYS: tl.constexpr = k.shape[0]
    k, v = k.to(q.dtype), v.to(q.dtype)
    position = span * KEYS + tl.arange(0, KEYS)
    seen = position < context
    if lowest is not None:
        seen = seen & (position >= lowest)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if SOFTCAP > 0:
        scores = capped(scores, SOFTCAP)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - peak[:, None])
    factor = tl.exp2(top - peak)
    weight = weight * factor + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    return peak, weight, acc


@triton.jit
def attend_spans(q, pool, table, low, high, base, head, lowest, context, top, weight, scale, DIM: tl.constexpr,
                 ROW: tl.constexpr, SOFTCAP: tl.constexpr, KV_BLOCK: tl.constexpr, KV_BLOCK_ROWS: tl.constexpr,
                 KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Spans `low` to `high` into the online softmax that begins with top and weight [ROWS]. q: [ROWS, BLOCK_DIM]. Returns top,
    weight and the weighted sum of values, float32 [ROWS, BLOCK_DIM]."""
    dims = tl.arange(0, q.shape[1])
    acc = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    # a span's block is read one span ahead, so that the loop's loads hang on no load of the same turn and all run ahead
    block = span_blocks(table, low, lowest, context, KV_BLOCK, KEYS)
    for span in tl.range(low, high, num_stages=STAGES):
        k, v = span_kv(pool, block, span, base, head, lowest, context, dims, DIM, ROW, KV_BLOCK, KV_BLOCK_ROWS, KEYS, True)
        block = span_blocks(table, tl.minimum(span + 1, high - 1), lowest, context, KV_BLOCK, KEYS)
        top, weight, acc = fold(q, k, v, span, lowest, context, top, weight, acc, scale, SOFTCAP, PRECISION)
    return top, weight, acc


@triton.jit
def first_peak(sinks, heads, real):
    """Where the online softmax of these query heads begins: the greatest score, in base 2, and its weight. With a sink at its
    score; else at a finite one, so that a span without a written key weighs nothing."""
    ROWS: tl.constexpr = heads.shape[0]
    if sinks is None:
        top = tl.full([ROWS], -1e30, tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
    else:
        top = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * _LOG2_E
        weight = tl.full([ROWS], 1.0, tl.float32)
    return top, weight
