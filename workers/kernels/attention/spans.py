"""Spans of a row's keys, as decodes and chunks read them from the pool, and the online softmax over them. Imports triton."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def span_blocks(table, span, context, KV_BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The span's block id, or [KEYS] block ids where a span is longer than a block; 0 past the context."""
    if KEYS <= KV_BLOCK:
        blocks = tl.load(table + span * KEYS // KV_BLOCK)
    else:
        position = span * KEYS + tl.arange(0, KEYS)
        blocks = tl.load(table + position // KV_BLOCK, mask=position < context, other=0)
    return blocks


@triton.jit
def span_kv(pool, block, span, base, head, context, dims, KV_HEADS: tl.constexpr, DIM: tl.constexpr, KV_BLOCK: tl.constexpr,
           KV_BLOCK_ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Keys and values [KEYS, BLOCK_DIM] of one span. Values past the context are zeros where MASKED; keys are anything.

    base: the layer's first row in a block, in rows of KV_HEADS * DIM numbers; its values stand KV_BLOCK rows behind its keys.
    """
    ROW: tl.constexpr = KV_HEADS * DIM
    BLOCK_DIM: tl.constexpr = dims.shape[0]
    step = tl.arange(0, KEYS)
    written = span * KEYS + step < context
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
def fold(q, k, v, span, context, top, weight, acc, scale, PRECISION: tl.constexpr):
    """One span into the online softmax, in base 2. Keys and values of a pool in FP8 are exact in the query's dtype."""
    KEYS: tl.constexpr = k.shape[0]
    k, v = k.to(q.dtype), v.to(q.dtype)
    written = span * KEYS + tl.arange(0, KEYS) < context
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(written[None, :], scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - peak[:, None])
    factor = tl.exp2(top - peak)
    weight = weight * factor + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    return peak, weight, acc
