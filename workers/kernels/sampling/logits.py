"""One row's logits as the kernels of the sampler read them: its settings, its noise, its edits, a tile of ids at a time.

Device functions only. The formulas and their roundings are those of `workers.sampling`. Imports Triton and the layouts.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

# ruff: noqa: SIM102, RET505
# What the compiler decides stands in an `if` of its own, around what the device decides.

import triton
import triton.language as tl

from workers.kernels.sampling import record as layout
from workers.kernels.sampling.marks import BARRED_STOP, COUNT_BITS, IN_PROMPT

WORDS = tl.constexpr(layout.WORDS)
TEMPERATURE = tl.constexpr(layout.TEMPERATURE)
TOP_K = tl.constexpr(layout.TOP_K)
STREAM = tl.constexpr(layout.STREAM)
TOP_P = tl.constexpr(layout.TOP_P)
LOG_MIN_P = tl.constexpr(layout.LOG_MIN_P)
STOP_FROM = tl.constexpr(layout.STOP_FROM)
REPETITION = tl.constexpr(layout.REPETITION)
FREQUENCY = tl.constexpr(layout.FREQUENCY)
PRESENCE = tl.constexpr(layout.PRESENCE)
SAMPLED = tl.constexpr(layout.SAMPLED)
HAS_TOP_K = tl.constexpr(layout.HAS_TOP_K)
HAS_TOP_P = tl.constexpr(layout.HAS_TOP_P)
HAS_MIN_P = tl.constexpr(layout.HAS_MIN_P)
BIASED = tl.constexpr(layout.BIASED)
STOPS_BARRED = tl.constexpr(layout.STOPS_BARRED)
PENALISED = tl.constexpr(layout.PENALISED)
CONSTRAINED = tl.constexpr(layout.CONSTRAINED)
EDITED = tl.constexpr(layout.BIASED | layout.STOPS_BARRED | layout.PENALISED | layout.CONSTRAINED)
MARKED = tl.constexpr(layout.STOPS_BARRED | layout.PENALISED)
COUNT = tl.constexpr((1 << COUNT_BITS) - 1)
SEEN = tl.constexpr((1 << COUNT_BITS) - 1 | IN_PROMPT)
BARRED = tl.constexpr(BARRED_STOP)
NO_ID = tl.constexpr(2**31 - 1)  # behind every id
LN2 = tl.constexpr(0.6931471805599453)
UNIT = tl.constexpr(float(2**44))  # of probabilities in fixed point: 2^18 ids of weight 1 fit into 62 bits


# ---- one row's settings


@triton.jit
def load_float(words, AT: tl.constexpr):
    return tl.load(words + AT).to(tl.float32, bitcast=True)


@triton.jit
def load_pair(words, AT: tl.constexpr):
    """Two words as one uint64."""
    low = tl.load(words + AT).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + AT + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def load_double(words, AT: tl.constexpr):
    return load_pair(words, AT).to(tl.float64, bitcast=True)


@triton.jit
def noise_key(words, position):
    """`noise.keys`: the finalizer of SplitMix64, as two uint32."""
    state = load_pair(words, STREAM) + position.to(tl.uint64) * 0x9E3779B97F4A7C15
    mixed = state + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    mixed = mixed ^ (mixed >> 31)
    return (mixed & 0xFFFFFFFF).to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def min_p_floor(words, flags, top):
    """min_p: no scaled logit below this."""
    floor = float("-inf")
    if flags & HAS_MIN_P:
        floor = (top.to(tl.float64) + load_double(words, LOG_MIN_P)).to(tl.float32)
    return floor


# ---- one tile of ids


@triton.jit
def _uniform_bits(ids, key0, key1):
    """23 random bits of each id: Wellons' lowbias32, keyed twice, as in `noise`."""
    bits = (ids.to(tl.uint32) * 0x9E3779B1) ^ key0
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits ^= key1
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return (bits ^ (bits >> 16)) >> 9


@triton.jit
def gumbel(ids, key0, key1):
    """`noise.gumbel` in float32."""
    uniform = (_uniform_bits(ids, key0, key1).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _rough_log2(x, FAST: tl.constexpr):
    """The device's own instruction; near 1 its error is absolute, about 2^-22."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def rough_score(x, inverse, ids, key0, key1, FAST: tl.constexpr):
    """x * inverse + gumbel, to about 1e-5, at a third of the cost.

    -log(u) near u = 1, where the winners are, by its series in 1 - u, which is exact.
    """
    one_up = (_uniform_bits(ids, key0, key1) | 0x3F800000).to(tl.float32, bitcast=True)  # u + 1 - 2^-24
    rest = (2.0 - one_up) - 5.9604644775390625e-08
    series = tl.fma(rest, 0.25, 0.3333333333)
    series = tl.fma(series, rest, 0.5)
    series = tl.fma(series, rest, 1.0) * rest
    far = _rough_log2((one_up - 1.0) + 5.9604644775390625e-08, FAST) * -LN2
    return tl.fma(x, inverse, _rough_log2(tl.where(rest < 0.03125, series, far), FAST) * -LN2)


@triton.jit
def _edit(x, ids, inside, words, flags, position, marks, bias, mask):
    """Bias, min_tokens, penalties, grammar, in the order of `LogitEdits` and with its roundings."""
    if bias is not None:
        if flags & BIASED:
            x += tl.load(bias + ids, mask=inside, other=0.0)
    if marks is not None:
        if flags & MARKED:
            mark = tl.load(marks + ids, mask=inside, other=0)
            barred = ((mark & BARRED) != 0) & (position < tl.load(words + STOP_FROM))
            x = tl.where(barred, float("-inf"), x)
            if flags & PENALISED:
                repetition = load_float(words, REPETITION)
                repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
                x = tl.where((mark & SEEN) != 0, repeated, x)
                count = (mark & COUNT).to(tl.float32)
                emitted = tl.where(count > 0, load_float(words, PRESENCE), 0.0)
                x = (x - load_float(words, FREQUENCY) * count) - emitted
    if mask is not None:
        if flags & CONSTRAINED:
            word = tl.load(mask + (ids >> 5), mask=inside, other=0)
            x = tl.where(((word >> (ids & 31)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit
def logits_at(logits, ids, inside, words, flags, position, marks, bias, mask):
    """Edited logits of some ids, float32; -inf outside."""
    x = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if flags & EDITED:
        x = _edit(x, ids, inside, words, flags, position, marks, bias, mask)
    return x


@triton.jit
def is_ahead(x, ids, value, token):
    return (x > value) | ((x == value) & (ids < token))


@triton.jit
def ordered(x):
    """float32 as uint32 in the same order; -0 equals 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def first_best(scores, ids):
    """The highest score and the lowest id that has it."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, ids, NO_ID), 0)


@triton.jit
def fixed_point(weights):
    return (weights * UNIT).to(tl.int64)
