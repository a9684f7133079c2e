"""What stands between the QKV projection and attention: norms of queries and keys, rotation, the KV write. One launch.

Everything is in float32 from the projection's output to the one rounding at the end. Imports torch and triton.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from workers.kernels.heads.finite import finite
from workers.kernels.heads.fp8 import stored
from workers.kernels.heads.turn import HeadTurn
from workers.kernels.launch import enter, interpreted
from workers.kernels.lora.up import RANKS, columns_of, operands, raised, rank_of, slot_of
from workers.kernels.lora.weights import Awaited

FEW_TOKENS = 16  # up to here the latency of one program decides, above it how many there are
ADAPTED_HEADS, ADAPTED_WARPS = 4, 4  # of a program that holds B's columns beside them


@triton.jit
def turned_heads(heads, weight, turns, dims, real, eps, DIM: tl.constexpr, WAIT: tl.constexpr):
    """Heads [ROWS, BLOCK_DIM] in float32, normed unless `weight` is None, and turned. heads, turns [ROWS]: where they stand,
    and where the table's rows of their positions do. real [ROWS]: false for rows that are zeros. WAIT: the launch before this
    one writes the heads, and is waited for."""
    inside = real[:, None] & (dims < DIM)[None, :]
    partner = (dims + DIM // 2) % DIM
    cos = tl.load(turns[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(turns[:, None] + DIM + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        of_x = tl.load(weight + dims, mask=dims < DIM, other=0.0).to(tl.float32)[None, :]
        of_other = tl.load(weight + partner, mask=dims < DIM, other=0.0).to(tl.float32)[None, :]
    if WAIT:
        gdc_wait()
    x = tl.load(heads[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(heads[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x *= scale * of_x
        other *= scale * of_other
    return x * cos + other * sin


@triton.jit
def _qk_norm_rope_write(qkv, q_weight, k_weight, table, positions, slots, keys, values, out, adapter_low, b, adapters,
                        qkv_stride, block_stride, slot_stride, low_stride, eps, key_scale, value_scale, HEADS: tl.constexpr,
                        KV_HEADS: tl.constexpr, DIM: tl.constexpr, KV_BLOCK: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK: tl.constexpr, NORM: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS heads of one token, out of the queries', the keys' and the values' heads as they lie in `qkv`.

    A head is held as its two halves, since a rotation turns number i of the first against number i of the second. key_scale,
    value_scale: of a pool in FP8, None for another. RANK: of the adapters whose part the projection awaits; 0: it is whole.
    """
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    inside = (at < HALF)[None, :]
    if RANK > 0:
        adapter, there = slot_of(adapters, token)
        own = b + adapter * ((HEADS + 2 * KV_HEADS) * DIM * RANK)
        n = head[:, None] * DIM + at[None, :]
        wanted = (head < HEADS + 2 * KV_HEADS)[:, None] & inside & there
        of_low = columns_of(own, n, wanted, 0, RANK, RANKS, 2)
        of_high = columns_of(own, n + HALF, wanted, 0, RANK, RANKS, 2)
    enter(PDL)
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    real = (head < HEADS + 2 * KV_HEADS)[:, None] & inside
    source = qkv + token * qkv_stride + head[:, None] * DIM + at[None, :]
    raw_low = tl.load(source, mask=real, other=0.0)
    raw_high = tl.load(source + HALF, mask=real, other=0.0)
    low = raw_low.to(tl.float32)
    high = raw_high.to(tl.float32)
    if RANK > 0:
        part = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
        mine = adapter_low + token * low_stride + adapter * (3 * RANK) + part[:, None, None] * RANK
        low += raised(of_low, own, mine, n, wanted, there, RANK, RANKS, 2)
        high += raised(of_high, own, mine, n + HALF, wanted, there, RANK, RANKS, 2)
        raw_low, raw_high = low.to(raw_low.dtype), high.to(raw_high.dtype)
    if NORM:
        power = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM
        scale = tl.rsqrt(power + eps)[:, None]
        for_query = is_query[:, None] & inside
        for_key = is_key[:, None] & inside
        low *= scale * (tl.load(q_weight + at[None, :], mask=for_query, other=0.0).to(tl.float32)
                        + tl.load(k_weight + at[None, :], mask=for_key, other=0.0).to(tl.float32))  # fmt: skip
        high *= scale * (tl.load(q_weight + HALF + at[None, :], mask=for_query, other=0.0).to(tl.float32)
                         + tl.load(k_weight + HALF + at[None, :], mask=for_key, other=0.0).to(tl.float32))  # fmt: skip
    turn = table + position * (2 * DIM) + at[None, :]
    cos_low = tl.load(turn, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(turn + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(turn + DIM, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(turn + DIM + HALF, mask=inside, other=0.0).to(tl.float32)
    turned_low = (low * cos_low + high * sin_low).to(out.dtype.element_ty)
    turned_high = (high * cos_high + low * sin_high).to(out.dtype.element_ty)

    query = out + (token * HEADS + head[:, None]) * DIM + at[None, :]
    tl.store(query, turned_low, mask=is_query[:, None] & inside)
    tl.store(query + HALF, turned_high, mask=is_query[:, None] & inside)
    if key_scale is not None:
        turned_low, turned_high = stored(turned_low, key_scale), stored(turned_high, key_scale)
        raw_low, raw_high = stored(raw_low, value_scale), stored(raw_high, value_scale)
    else:
        raw_low, raw_high = finite(raw_low), finite(raw_high)
    slot_at = slot // KV_BLOCK * block_stride + slot % KV_BLOCK * slot_stride
    key = keys + slot_at + (head[:, None] - HEADS) * DIM + at[None, :]
    tl.store(key, turned_low, mask=is_key[:, None] & inside)
    tl.store(key + HALF, turned_high, mask=is_key[:, None] & inside)
    value = values + slot_at + (head[:, None] - HEADS - KV_HEADS) * DIM + at[None, :]
    tl.store(value, raw_low, mask=is_value[:, None] & inside)
    tl.store(value + HALF, raw_high, mask=is_value[:, None] & inside)


def qk_norm_rope_write(
    qkv: Tensor,
    turn: HeadTurn,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    kv_heads: int,
    out: Tensor,
    *,
    scales: tuple[float, float] | None = None,
    awaited: Awaited | None = None,
    pdl: bool = False,
) -> Tensor:
    """Turns the queries into `out` and writes the turned keys, and the values (`finite`), to their slots of the pool.

    qkv [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys, values; rows may lie apart. positions, slots [tokens] int32
    or int64; a slot is block * block_size + offset. keys, values [block, slot, kv_head, head_dim]: `KVPool.keys` and `values`
    of the layer. out [tokens, heads, head_dim], contiguous; returned. scales: `KVPool.scales` of the layer.
    awaited: what adapters add to qkv yet, of three parts.
    """
    tokens, dim = qkv.shape[0], keys.shape[3]
    if not tokens:
        return out
    pdl = pdl and not interpreted()
    rows, warps = (1, 1) if tokens <= FEW_TOKENS else (8, 2)
    if awaited is not None:
        rows, warps = ADAPTED_HEADS, ADAPTED_WARPS
    low, b, adapters, low_stride = operands(awaited)
    total = heads + 2 * kv_heads
    block = triton.next_power_of_2(dim // 2)
    table, norm = turn.table, turn.q_weight is not None
    _qk_norm_rope_write[(tokens, triton.cdiv(total, rows))](
        qkv, turn.q_weight if norm else table, turn.k_weight if norm else table, table, positions, slots, keys, values, out,
        low, b, adapters, qkv.stride(0), keys.stride(0), keys.stride(1), low_stride, turn.eps, *(scales or (None, None)),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, KV_BLOCK=keys.shape[1], ROWS=rows, BLOCK=block, NORM=norm,
        RANK=rank_of(awaited), RANKS=RANKS, PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
