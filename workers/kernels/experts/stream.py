"""The experts of up to 4 tokens: multiplies and adds in float32 while each pair's matrices stream through registers.

Two launches: gate and up of each pair, of the norm of x, with SwiGLU; then down of a token's pairs, times their weights and
added up in their order, with the residual. Nothing is sorted, and only the chosen experts are read, by several tokens now and
then twice.
Imports torch and triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.experts.grouped import Clamp
from workers.kernels.experts.route import Choice
from workers.kernels.launch import enter, interpreted

FEW_TOKENS = 4
MOST_COLUMNS = 2048
MOST_UNROLLED = 32  # turns


@triton.jit
def _eights(products, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> sums of eight neighbours, which one thread holds."""
    return tl.sum(tl.reshape(products, [ROWS, COLUMNS // 8, 8]), 2)


@triton.jit
def _rows(base, rows, columns, K: tl.constexpr, COLUMNS: tl.constexpr):
    """W[rows, columns] in float32, zero beyond K."""
    at = base + rows.to(tl.int64)[:, None] * K + columns[None, :]
    if K % COLUMNS == 0:
        return tl.load(at, eviction_policy="evict_first").to(tl.float32)
    return tl.load(at, mask=(columns < K)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _up(x, norm_weight, weight, bias, chosen, out, x_stride, eps, alpha, limit, N: tl.constexpr, K: tl.constexpr,
        TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_TURNS: tl.constexpr, CLAMPED: tl.constexpr,
        BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of gate and as many of up, of one pair."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    pair = tl.program_id(0) // BLOCKS
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, N - 1)
    one = 2 * safe if IN_TURNS else safe
    other = one + 1 if IN_TURNS else one + N
    enter(PDL)
    expert = tl.load(chosen + pair).to(tl.int64)
    if expert < 0:
        return
    base = weight + expert * (2 * N * K)
    source = x + (pair // TOP).to(tl.int64) * x_stride
    gates = tl.zeros([ROWS, COLUMNS // 8], tl.float32)
    ups = gates
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        a = tl.load(source + column, mask=column < K, other=0.0).to(tl.float32)
        squares += a * a
        a *= tl.load(norm_weight + column, mask=column < K, other=0.0).to(tl.float32)
        gates += _eights(_rows(base, one, column, K, COLUMNS) * a[None, :], ROWS, COLUMNS)
        ups += _eights(_rows(base, other, column, K, COLUMNS) * a[None, :], ROWS, COLUMNS)
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    gate = tl.sum(gates, 1) * scale
    up = tl.sum(ups, 1) * scale
    if BIAS:
        gate += tl.load(bias + expert * (2 * N) + one).to(tl.float32)
        up += tl.load(bias + expert * (2 * N) + other).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1
        gate = gate / (1 + tl.exp(-alpha * gate))
    else:
        gate = gate / (1 + tl.exp(-gate))
    tl.store(out + pair.to(tl.int64) * N + row, (gate * up).to(out.dtype.element_ty), mask=row < N)


@triton.jit
def _turn(sums, x, weight, chosen, shares, pair, start, rows, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """Adds what COLUMNS numbers of one pair give to the sums, times the pair's weight; of padding nothing."""
    expert = tl.load(chosen + pair)
    share = tl.where(expert < 0, 0.0, tl.load(shares + pair))
    column = start + tl.arange(0, COLUMNS)
    real = tl.where(expert < 0, 0, K)
    a = tl.load(x + pair * K + column, mask=column < real, other=0.0).to(tl.float32) * share
    base = weight + tl.maximum(expert, 0).to(tl.int64) * (N * K)
    return sums + _eights(_rows(base, rows, column, K, COLUMNS) * a[None, :], ROWS, COLUMNS)


@triton.jit
def _down(x, weight, bias, chosen, shares, gates, shared, out, shared_stride, out_stride, N: tl.constexpr, K: tl.constexpr,
          TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr, BIAS: tl.constexpr,
          SHARED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of one token, over all of its experts."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    TURNS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, N - 1)
    enter(PDL)
    if tl.load(chosen + token * TOP) < 0:
        return
    sums = tl.zeros([ROWS, COLUMNS // 8], tl.float32)
    if UNROLLED:
        for turn in tl.static_range(TOP * TURNS):
            sums = _turn(sums, x, weight, chosen, shares, token * TOP + turn // TURNS, turn % TURNS * COLUMNS, safe, N, K, ROWS,
                         COLUMNS)  # fmt: skip
    else:
        for turn in tl.range(0, TOP * TURNS, num_stages=4):
            sums = _turn(sums, x, weight, chosen, shares, token * TOP + turn // TURNS, turn % TURNS * COLUMNS, safe, N, K, ROWS,
                         COLUMNS)  # fmt: skip
    total = tl.sum(sums, 1)
    if BIAS:
        for number in tl.static_range(TOP):
            pair = token * TOP + number
            at = bias + tl.load(chosen + pair).to(tl.int64) * N + safe
            total += tl.load(shares + pair) * tl.load(at).to(tl.float32)
    if SHARED:
        total += tl.load(gates + token) * tl.load(shared + token * shared_stride + safe).to(tl.float32)
    to = out + token * out_stride + row
    total += tl.load(to, mask=row < N, other=0.0).to(tl.float32)
    tl.store(to, total.to(out.dtype.element_ty), mask=row < N)


def few_up(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, choice: Choice, *, bias: Tensor | None = None,
    in_turns: bool = False, clamp: Clamp | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """x [tokens, K], of which the RMSNorm is taken; weight [experts, 2 * N, K] contiguous, bias [experts, 2 * N] -> SwiGLU of
    each pair, [tokens * per_token, N]; of padding undefined."""
    n, k = weight.shape[1] // 2, weight.shape[2]
    pairs = choice.chosen.numel()
    out = torch.empty(pairs, n, dtype=x.dtype, device=x.device)
    columns = min(MOST_COLUMNS, triton.next_power_of_2(k))
    rows, warps = (4, 8) if columns == MOST_COLUMNS else (4, 4)
    pdl = pdl and not interpreted()
    _up[(pairs * triton.cdiv(n, rows),)](
        x, norm_weight, weight, weight if bias is None else bias, choice.chosen, out, x.stride(0), eps,
        clamp.alpha if clamp else 0.0, clamp.limit if clamp else 0.0, N=n, K=k, TOP=choice.per_token, ROWS=rows,
        COLUMNS=columns, IN_TURNS=in_turns, CLAMPED=clamp is not None, BIAS=bias is not None, PDL=pdl, num_warps=warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return out


def few_down(
    x: Tensor, weight: Tensor, choice: Choice, residual: Tensor, *, bias: Tensor | None = None, shared: Tensor | None = None,
    pdl: bool = False,
) -> None:  # fmt: skip
    """Adds each token's experts to residual [tokens, N], in float32 and rounded once; padding stays as it was.

    x [tokens * per_token, K] as `few_up` gives it, weight [experts, N, K] contiguous, bias [experts, N]. shared [tokens, N]: is
    added times `choice.gates`.
    """
    n, k = weight.shape[1:]
    columns = next((size for size in (512, 256, 128) if k % size == 0), min(512, triton.next_power_of_2(k)))
    pdl = pdl and not interpreted()
    added = residual if shared is None else shared
    turns = choice.per_token * triton.cdiv(k, columns)
    _down[(len(residual) * triton.cdiv(n, 4),)](
        x, weight, weight if bias is None else bias, choice.chosen, choice.weights,
        choice.weights if choice.gates is None else choice.gates, added, residual, added.stride(0), residual.stride(0), N=n,
        K=k, TOP=choice.per_token, ROWS=4, COLUMNS=columns, UNROLLED=turns <= MOST_UNROLLED, BIAS=bias is not None,
        SHARED=shared is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
