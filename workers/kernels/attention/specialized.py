"""The plain chunk attention of `chunks` for Hopper: one warp copies, two groups of four compute.

Warp specialization, in Gluon, where a program says itself which warps do what and when they wait for the tensor cores. While
one group multiplies, the other computes its softmax; and within a group a span's keys and the values of the span before are
multiplied together. Compiled for Hopper alone; no interpreter knows it.

    copies   : wait until both groups have left a slot ─▶ a span's keys, its values, by the copy engine
    each half: wait for keys ─▶ scores ─▶ leave them ─▶ softmax ─▶ sum of the span before is there ─▶ leave its values

Imports torch, triton (3.6 and later) and the pool.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvcache.pool import KVPool

HALF = gl.constexpr(64)  # rows of a tile, that one group has
REGISTERS = gl.constexpr(240)  # a thread of a group that computes; what is left is enough for the warp that copies
FEW_REGISTERS = gl.constexpr(24)

# names of Triton 3.6, and those since
_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _copy(spans_at, keys, values, has_keys, has_values, keys_left, values_left, table, spans, base, column,
          KV_BLOCK: gl.constexpr, KV_BLOCK_ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """All spans, each as soon as both groups have left what stood in its place."""
    for span in range(spans):
        slot = span % STAGES
        phase = (span // STAGES + 1) & 1
        row = gl.load(table + span * KEYS // KV_BLOCK) * KV_BLOCK_ROWS + base + span * KEYS % KV_BLOCK
        mbarrier.wait(keys_left.index(slot), phase, pred=span >= STAGES)
        mbarrier.expect(has_keys.index(slot), spans_at.block_type.nbytes)
        _load_tile(spans_at, [row, column], has_keys.index(slot), keys.index(slot))
        mbarrier.wait(values_left.index(slot), phase, pred=span >= STAGES)
        mbarrier.expect(has_values.index(slot), spans_at.block_type.nbytes)
        _load_tile(spans_at, [row + KV_BLOCK, column], has_values.index(slot), values.index(slot))


@gluon.jit
def _weighed(scores, span, seen, top, weight, scale, MASKED: gl.constexpr, KEYS: gl.constexpr, layout: gl.constexpr):
    """Scores [HALF, KEYS] -> the rows' new peaks and weights, what all before shrinks by, and the span's probabilities."""
    if MASKED:
        position = span * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
        scores = gl.where(position[None, :] < seen[:, None], scores, float("-inf"))
    peak = gl.maximum(top, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - peak[:, None])
    factor = gl.exp2(top - peak)
    return peak, weight * factor + gl.sum(p, 1), factor, p


@gluon.jit
def _fold(q, keys, values, has_keys, has_values, keys_left, values_left, span, p, seen, top, weight, acc, scale,
          MASKED: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, scored: gl.constexpr,
          summed: gl.constexpr):  # fmt: skip
    """Multiplies a span's keys, and by p the values of the span before."""
    slot, before = span % STAGES, (span - 1) % STAGES
    none = gl.zeros([HALF, KEYS], gl.float32, scored)
    mbarrier.wait(has_keys.index(slot), (span // STAGES) & 1)
    scores = warpgroup_mma(q, keys.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(has_values.index(before), ((span - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, values.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    _meet()  # all four warps have read the keys
    mbarrier.arrive(keys_left.index(slot), count=1)
    top, weight, factor, fresh = _weighed(scores, span, seen, top, weight, scale, MASKED, KEYS, scored)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _meet()
    mbarrier.arrive(values_left.index(before), count=1)
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, summed))[:, None]
    p = gl.convert_layout(fresh.to(keys.dtype), gl.DotOperandLayout(0, summed, 2))
    return p, top, weight, acc


@gluon.jit
def _attend_half(query, queries, keys, values, has_keys, has_values, keys_left, values_left, out, spans, index, before, last,
                 context, head, scale, query_stride, out_stride, PART: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
                 KEYS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """A group of four warps: HALF rows of the tile. before: keys before the tile; last: its tokens."""
    DTYPE: gl.constexpr = keys.dtype
    FIRST: gl.constexpr = PART * HALF // GROUP
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (DIM // 8), DIM // 8], [4, 1], [1, 0])
    rows = gl.arange(0, HALF, layout=gl.SliceLayout(1, spread))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, spread))
    token = FIRST + rows // GROUP
    columns = (head * GROUP + rows % GROUP) * DIM
    real = (token < last)[:, None] & (dims >= 0)[None, :]
    at = (index + token).to(gl.int64)[:, None]
    q = queries.index(PART)
    q.store(gl.load(query + at * query_stride + columns[:, None] + dims[None, :], mask=real, other=0.0))
    fence_async_shared()
    _meet()
    own = gl.arange(0, HALF, layout=gl.SliceLayout(1, scored))
    seen = before + FIRST + own // GROUP + 1
    full = gl.minimum((before + FIRST + 1) // KEYS, spans)  # spans that every row sees wholly
    top = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, scored))
    weight = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, scored))
    acc = gl.zeros([HALF, DIM], gl.float32, summed)

    none = gl.zeros([HALF, KEYS], gl.float32, scored)
    mbarrier.wait(has_keys.index(0), 0)
    scores = warpgroup_mma(q, keys.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    _meet()
    mbarrier.arrive(keys_left.index(0), count=1)
    top, weight, _, fresh = _weighed(scores, 0, seen, top, weight, scale, True, KEYS, scored)
    p = gl.convert_layout(fresh.to(DTYPE), gl.DotOperandLayout(0, summed, 2))
    for span in range(1, full):
        p, top, weight, acc = _fold(
            q, keys, values, has_keys, has_values, keys_left, values_left, span, p, seen, top, weight, acc, scale, False,
            KEYS, STAGES, scored, summed,
        )  # fmt: skip
    for span in range(gl.maximum(full, 1), spans):
        p, top, weight, acc = _fold(
            q, keys, values, has_keys, has_values, keys_left, values_left, span, p, seen, top, weight, acc, scale, True,
            KEYS, STAGES, scored, summed,
        )  # fmt: skip
    slot = (spans - 1) % STAGES
    mbarrier.wait(has_values.index(slot), ((spans - 1) // STAGES) & 1)
    if spans * KEYS > context:  # what has not been written may be NaN, which no probability of nought hides; both groups clean
        unclean = values.index(slot)
        written = (spans - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, spread)) < context
        unclean.store(gl.where(written[:, None], unclean.load(spread), 0.0))
        fence_async_shared()
        _meet()
    acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(p, values.index(slot), acc, is_async=True),))
    acc = acc / gl.convert_layout(weight, gl.SliceLayout(1, summed))[:, None]
    result = gl.convert_layout(acc.to(DTYPE), spread)
    gl.store(out + at * out_stride + columns[:, None] + dims[None, :], result, mask=real)


@gluon.jit(do_not_specialize=["layer", "table_stride"])
def attend_specialized(query, spans_at, tables, tiles, contexts, out, layer, scale, query_stride, table_stride, out_stride,
                       KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, KV_BLOCK: gl.constexpr,
                       LAYERS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """One program: one tile of 2 * HALF query rows x one KV head, as in `chunks`. spans_at: a descriptor of the pool's rows, in
    parts of KEYS rows of one head. KEYS divides KV_BLOCK, and GROUP HALF."""
    at = tiles + gl.program_id(0) // KV_HEADS * 4
    head = gl.program_id(0) % KV_HEADS
    sequence = gl.load(at)
    if sequence < 0:
        return
    first, index, before = gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
    context = gl.load(contexts + sequence)
    last = gl.minimum(2 * HALF // GROUP, context - before - first)
    before += first
    spans = (before + last + KEYS - 1) // KEYS
    table = tables + sequence.to(gl.int64) * table_stride
    DTYPE: gl.constexpr = query.dtype.element_ty
    KV_BLOCK_ROWS: gl.constexpr = LAYERS * 2 * KV_BLOCK

    keys = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], spans_at.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], spans_at.layout)
    held: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, DIM], DTYPE)
    queries = gl.allocate_shared_memory(DTYPE, [2, HALF, DIM], held)
    has_keys = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    has_values = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(has_keys.index(i), count=1)
        mbarrier.init(has_values.index(i), count=1)
        mbarrier.init(keys_left.index(i), count=2)
        mbarrier.init(values_left.index(i), count=2)
    fence_async_shared()
    _meet()
    gl.warp_specialize(
        [
            (_attend_half, (query, queries, keys, values, has_keys, has_values, keys_left, values_left, out, spans, index,
                            before, last, context, head, scale, query_stride, out_stride, gl.constexpr(0), GROUP, DIM, KEYS,
                            STAGES)),
            (_attend_half, (query, queries, keys, values, has_keys, has_values, keys_left, values_left, out, spans, index,
                            before, last, context, head, scale, query_stride, out_stride, gl.constexpr(1), GROUP, DIM, KEYS,
                            STAGES)),
            (_copy, (spans_at, keys, values, has_keys, has_values, keys_left, values_left, table, spans,
                     layer * (2 * KV_BLOCK), head * DIM, KV_BLOCK, KV_BLOCK_ROWS, KEYS, STAGES)),
        ],
        [4, 1], [REGISTERS, FEW_REGISTERS],
    )  # fmt: skip


class SpecializedChunks:
    """The kernel over one pool of 16 bits. keys: of a span, which divide a block; stages: spans in shared memory. kv_heads,
    dim: of the heads that are asked for, which need not be as the pool names them."""

    def __init__(self, pool: KVPool, keys: int, stages: int, kv_heads: int, dim: int) -> None:
        layout, self._keys, self._stages, self._kv_heads, self._dim = pool.layout, keys, stages, kv_heads, dim
        width = layout.kv_heads * layout.head_dim
        held = gl.NVMMASharedLayout.get_default_for([keys, dim], gl.bfloat16)  # of any dtype of as many bits
        shape, strides = [pool.data.numel() // width, width], [width, 1]
        self._spans_at = TensorDescriptor(pool.data, shape, strides, [keys, dim], held)
        self._kv_block, self._layers = layout.block_size, layout.layers

    def run(
        self, layer: int, query: Tensor, block_tables: Tensor, context_lens: Tensor, tiles: Tensor, out: Tensor, scale: float
    ) -> None:
        """As `ChunkAttention.run`, of a plan of tiles of 2 * HALF rows. scale: in base 2."""
        attend_specialized[(len(tiles) * self._kv_heads,)](
            query, self._spans_at, block_tables, tiles, context_lens, out, layer, scale, query.stride(0),
            block_tables.stride(0), out.stride(0), KV_HEADS=self._kv_heads, GROUP=query.shape[1] // self._kv_heads,
            DIM=self._dim, KV_BLOCK=self._kv_block, LAYERS=self._layers, KEYS=self._keys, STAGES=self._stages, num_warps=4,
        )  # fmt: skip
