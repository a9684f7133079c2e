"""Decode attention over keys and values in FP8, read as pairs of neighbouring numbers. Imports triton.

A product takes values by columns, two keys' numbers beside each other, and the unit that turns rows into columns on their way
from shared memory knows 16 bits, no 8: values are read as what is twice as wide, and a head becomes two halves, its numbers of
even and of odd index, that go through products of their own. Keys likewise, so that queries are read as for any other pool.
"""

import triton
import triton.language as tl

from workers.kernels.attention.spans import capped, span_blocks, span_kv
from workers.kernels.heads.fp8 import query_for_fp8, widened


@triton.jit
def _fold_pairs(even_q, odd_q, k, v, span, lowest, context, top, weights, even, odd, scale, SOFTCAP: tl.constexpr):
    """As `spans.fold`. k, v: [KEYS, BLOCK_DIM / 2] uint16. weights: [ROWS, KEYS], summed by the caller at last, since warps
    that hold different keys wait for each other in every sum."""
    KEYS: tl.constexpr = k.shape[0]
    position = span * KEYS + tl.arange(0, KEYS)
    seen = position < context
    if lowest is not None:
        seen = seen & (position >= lowest)
    even_k, odd_k = widened(k)
    scores = tl.dot(odd_q, tl.trans(odd_k), tl.dot(even_q, tl.trans(even_k))) * scale
    if SOFTCAP > 0:
        scores = capped(scores, SOFTCAP)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - peak[:, None])
    factor = tl.exp2(top - peak)[:, None]
    weights = weights * factor + p
    p = p.to(tl.float16)
    even_v, odd_v = widened(v)
    return peak, weights, tl.dot(p, even_v, even * factor), tl.dot(p, odd_v, odd * factor)


@triton.jit
def attend_pairs(q, pool, table, low, high, base, head, lowest, context, top, weight, scale, DIM: tl.constexpr,
                 ROW: tl.constexpr, SOFTCAP: tl.constexpr, KV_BLOCK: tl.constexpr, KV_BLOCK_ROWS: tl.constexpr,
                 KEYS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Spans `low` to `high` of a pool in FP8 into the online softmax that begins with top and weight [ROWS]. q: [ROWS,
    BLOCK_DIM] in bfloat16 or float16. Returns top, weight and the weighted sum of values as they are stored, float32 [ROWS,
    BLOCK_DIM]."""
    ROWS: tl.constexpr = q.shape[0]
    HALF: tl.constexpr = q.shape[1] // 2
    dims = tl.arange(0, HALF)
    even_q, odd_q = query_for_fp8(q).reshape(ROWS, HALF, 2).split()
    pairs = pool.to(tl.pointer_type(tl.uint16), bitcast=True)
    first = top
    weights = tl.zeros([ROWS, KEYS], tl.float32)
    even = tl.zeros([ROWS, HALF], tl.float32)
    odd = tl.zeros([ROWS, HALF], tl.float32)
    block = span_blocks(table, low, lowest, context, KV_BLOCK, KEYS)
    for span in tl.range(low, high, num_stages=STAGES):
        k, v = span_kv(pairs, block, span, base, head, lowest, context, dims, DIM // 2, ROW // 2, KV_BLOCK, KV_BLOCK_ROWS,
                       KEYS, True)  # fmt: skip
        block = span_blocks(table, tl.minimum(span + 1, high - 1), lowest, context, KV_BLOCK, KEYS)
        top, weights, even, odd = _fold_pairs(even_q, odd_q, k, v, span, lowest, context, top, weights, even, odd, scale,
                                              SOFTCAP)  # fmt: skip
    return top, weight * tl.exp2(first - top) + tl.sum(weights, 1), tl.join(even, odd).reshape(ROWS, 2 * HALF)
