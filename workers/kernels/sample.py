"""The next token of every sample in a fixed number of launches, for any mixture of settings, and without a word to the host.

    scan    (samples, splits)  edit, scale, add noise: each split's best score; rows with top_k: maxima of groups of ids
    round   (samples, splits)  rows with top_p or min_p: is the winner inside? if not, the best of those ahead of it
                               rows with top_k: the ids that may be among the first k are collected
    finish  (samples)          merge, decide among what was collected, count the token, write it

Just what filtering first would give, by rejection (as in FlashInfer's sampling kernels): a winner with too much ahead of it
is out, and so is all behind it. Rows that no round has settled are settled by `finish`, in a loop of its own. A token depends
on its row's logits and settings alone, to the last bit: noise and scores are recomputed exactly where approximations are
close, and probabilities are summed in fixed point, where the order does not count.

Imports torch, Triton, NumPy's settings layout. Reads `workers.sampling.settings` records; allocates nothing in `sample`.
"""

# ruff: noqa: SIM102, RET505
# What the compiler decides stands in an `if` of its own, around what the device decides.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scheduler.messages import NO_TOKEN
from workers.kernels.marks import BARRED_STOP, COUNT_BITS, IN_PROMPT
from workers.sampling import settings as layout

MAX_SPLITS = 64
GROUPS = 4096
"""Groups of ids in a row, at most, whose maxima bound the k-th best."""
CAPACITY = 2048
"""Ids that can be collected for a row with top_k; more, for a large top_k or many ties, are found in passes over the row."""
ROUNDS = 2

_WORDS = tl.constexpr(layout.WORDS)
_TEMPERATURE = tl.constexpr(layout.TEMPERATURE)
_TOP_K = tl.constexpr(layout.TOP_K)
_STREAM = tl.constexpr(layout.STREAM)
_TOP_P = tl.constexpr(layout.TOP_P)
_LOG_MIN_P = tl.constexpr(layout.LOG_MIN_P)
_STOP_FROM = tl.constexpr(layout.STOP_FROM)
_REPETITION = tl.constexpr(layout.REPETITION)
_FREQUENCY = tl.constexpr(layout.FREQUENCY)
_PRESENCE = tl.constexpr(layout.PRESENCE)
_SAMPLED = tl.constexpr(layout.SAMPLED)
_HAS_TOP_K = tl.constexpr(layout.HAS_TOP_K)
_HAS_TOP_P = tl.constexpr(layout.HAS_TOP_P)
_HAS_MIN_P = tl.constexpr(layout.HAS_MIN_P)
_BIASED = tl.constexpr(layout.BIASED)
_STOPS_BARRED = tl.constexpr(layout.STOPS_BARRED)
_PENALISED = tl.constexpr(layout.PENALISED)
_CONSTRAINED = tl.constexpr(layout.CONSTRAINED)
_EDITED = tl.constexpr(layout.BIASED | layout.STOPS_BARRED | layout.PENALISED | layout.CONSTRAINED)
_MARKED = tl.constexpr(layout.STOPS_BARRED | layout.PENALISED)
_COUNT = tl.constexpr((1 << COUNT_BITS) - 1)
_SEEN = tl.constexpr((1 << COUNT_BITS) - 1 | IN_PROMPT)
_BARRED = tl.constexpr(BARRED_STOP)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_NO_ID = tl.constexpr(2**31 - 1)  # behind every id
_LN2 = tl.constexpr(0.6931471805599453)
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
_UNIT = tl.constexpr(float(2**44))  # of probabilities in fixed point: 2^18 ids of weight 1 fit into 62 bits
_CLOSE = tl.constexpr(4e-5)  # scores this near to each other, more where they are large, are compared exactly


# ---- one row's settings


@triton.jit
def _float(words, AT: tl.constexpr):
    return tl.load(words + AT).to(tl.float32, bitcast=True)


@triton.jit
def _pair(words, AT: tl.constexpr):
    """Two words as one uint64."""
    low = tl.load(words + AT).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + AT + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def _double(words, AT: tl.constexpr):
    return _pair(words, AT).to(tl.float64, bitcast=True)


@triton.jit
def _noise_key(words, position):
    """`noise.keys`: the finalizer of SplitMix64, as two uint32."""
    state = _pair(words, _STREAM) + position.to(tl.uint64) * 0x9E3779B97F4A7C15
    mixed = state + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    mixed = mixed ^ (mixed >> 31)
    return (mixed & 0xFFFFFFFF).to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def _floor(words, flags, top):
    """min_p: no scaled logit below this."""
    floor = float("-inf")
    if flags & _HAS_MIN_P:
        floor = (top.to(tl.float64) + _double(words, _LOG_MIN_P)).to(tl.float32)
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
def _gumbel(ids, key0, key1):
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
def _rough_score(x, inverse, ids, key0, key1, FAST: tl.constexpr):
    """x * inverse + gumbel, to about 1e-5, at a third of the cost.

    -log(u) near u = 1, where the winners are, by its series in 1 - u, which is exact.
    """
    one_up = (_uniform_bits(ids, key0, key1) | 0x3F800000).to(tl.float32, bitcast=True)  # u + 1 - 2^-24
    rest = (2.0 - one_up) - 5.9604644775390625e-08
    series = tl.fma(rest, 0.25, 0.3333333333)
    series = tl.fma(series, rest, 0.5)
    series = tl.fma(series, rest, 1.0) * rest
    far = _rough_log2((one_up - 1.0) + 5.9604644775390625e-08, FAST) * -_LN2
    return tl.fma(x, inverse, _rough_log2(tl.where(rest < 0.03125, series, far), FAST) * -_LN2)


@triton.jit
def _edit(x, ids, inside, words, flags, position, marks, bias, mask):
    """Bias, min_tokens, penalties, grammar, in the order of `LogitEdits` and with its roundings."""
    if bias is not None:
        if flags & _BIASED:
            x += tl.load(bias + ids, mask=inside, other=0.0)
    if marks is not None:
        if flags & _MARKED:
            mark = tl.load(marks + ids, mask=inside, other=0)
            barred = ((mark & _BARRED) != 0) & (position < tl.load(words + _STOP_FROM))
            x = tl.where(barred, float("-inf"), x)
            if flags & _PENALISED:
                repetition = _float(words, _REPETITION)
                repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
                x = tl.where((mark & _SEEN) != 0, repeated, x)
                count = (mark & _COUNT).to(tl.float32)
                emitted = tl.where(count > 0, _float(words, _PRESENCE), 0.0)
                x = (x - _float(words, _FREQUENCY) * count) - emitted
    if mask is not None:
        if flags & _CONSTRAINED:
            word = tl.load(mask + (ids >> 5), mask=inside, other=0)
            x = tl.where(((word >> (ids & 31)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit
def _logits_at(logits, ids, inside, words, flags, position, marks, bias, mask):
    """Edited logits of some ids, float32; -inf outside."""
    x = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if flags & _EDITED:
        x = _edit(x, ids, inside, words, flags, position, marks, bias, mask)
    return x


@triton.jit
def _is_ahead(x, ids, value, token):
    return (x > value) | ((x == value) & (ids < token))


@triton.jit
def _ordered(x):
    """float32 as uint32 in the same order; -0 equals 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _first(scores, ids):
    """The highest score and the lowest id that has it."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, ids, _NO_ID), 0)


@triton.jit
def _fixed(weights):
    return (weights * _UNIT).to(tl.int64)


# ---- many tiles


@triton.jit
def _settle(best, second, at, value, token, floor, low, high, logits, words, flags, position, marks, bias, mask,
            key0, key1, BLOCK: tl.constexpr):  # fmt: skip
    """The best exact score among [low, high), from each lane's best rough one: (score, scaled logit, id).

    Where a lane's second came near, another than its best may be the winner: then every score is computed exactly.
    """
    temperature = _float(words, _TEMPERATURE)
    valid = best > float("-inf")
    x = tl.div_rn(_logits_at(logits, at, valid, words, flags, position, marks, bias, mask), temperature)
    scores = tl.where(valid, x + _gumbel(at, key0, key1), float("-inf"))
    peak = tl.max(best, 0)
    if tl.max(second, 0) >= peak - (_CLOSE + 2e-6 * tl.abs(peak)):
        scores = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(low, high, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            inside = ids < high
            tile = tl.div_rn(_logits_at(logits, ids, inside, words, flags, position, marks, bias, mask), temperature)
            rivals = tl.where(_is_ahead(tile, ids, value, token) & (tile >= floor), tile + _gumbel(ids, key0, key1),
                              float("-inf"))  # fmt: skip
            at = tl.where(rivals > scores, ids, at)
            x = tl.where(rivals > scores, tile, x)
            scores = tl.maximum(scores, rivals)
    score, winner = _first(scores, at)
    return score, tl.max(tl.where((at == winner) & (scores == score), x, float("-inf")), 0), winner


@triton.jit
def _pass(value, token, floor, top, low, high, logits, words, flags, position, marks, bias, mask, key0, key1,
          BLOCK: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Over [low, high): the mass of all, the mass ahead of (value, token), and the best ahead of it and not below floor.

    Returns (total, ahead, score, scaled logit, id); masses are int64, relative to the weight of `top`.
    """
    temperature = _float(words, _TEMPERATURE)
    inverse = 1.0 / temperature
    total = tl.zeros([BLOCK], tl.int64)
    ahead = tl.zeros([BLOCK], tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    second = best
    at = tl.full([BLOCK], _NO_ID, tl.int32)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < high
        raw = _logits_at(logits, ids, inside, words, flags, position, marks, bias, mask)
        x = tl.div_rn(raw, temperature)
        weight = _fixed(tl.exp(x - top))
        before = _is_ahead(x, ids, value, token)
        total += weight
        ahead += tl.where(before, weight, 0)
        score = tl.where(before & (x >= floor), _rough_score(raw, inverse, ids, key0, key1, FAST), float("-inf"))
        second = tl.maximum(second, tl.minimum(best, score))
        at = tl.where(score > best, ids, at)
        best = tl.maximum(best, score)
    score, x, winner = _settle(best, second, at, value, token, floor, low, high, logits, words, flags, position,
                               marks, bias, mask, key0, key1, BLOCK)  # fmt: skip
    return tl.sum(total, 0), tl.sum(ahead, 0), score, x, winner


@triton.jit
def _top(tops, splits):
    """The highest scaled logit of a row; +inf if any is not finite."""
    at = tl.arange(0, _MAX_SPLITS)
    return tl.max(tl.load(tops + at, mask=at < splits, other=float("-inf")), 0)


@triton.jit
def _winner(scores, values, ids, splits):
    """The best of the splits of one row: (scaled logit, id)."""
    at = tl.arange(0, _MAX_SPLITS)
    inside = at < splits
    found = tl.load(ids + at, mask=inside, other=_NO_ID)
    _, winner = _first(tl.load(scores + at, mask=inside, other=float("-inf")), found)
    value = tl.load(values + at, mask=inside, other=float("-inf"))
    return tl.max(tl.where(found == winner, value, float("-inf")), 0), winner


@triton.jit
def _mass(masses, splits):
    at = tl.arange(0, _MAX_SPLITS)
    return tl.sum(tl.load(masses + at, mask=at < splits, other=0), 0)


@triton.jit
def _resolve(words, flags, floor, scores, values, ids, masses, done, chosen_value, chosen_id, splits,
             FIRST: tl.constexpr):  # fmt: skip
    """What the last launch has found of a row without top_k: (settled, scaled logit, id) of its present winner."""
    value, winner = _winner(scores, values, ids, splits)
    settled = 1
    if FIRST:
        if flags & _HAS_TOP_P:
            settled = 0
        if value < floor:
            settled = 0
    else:
        before = tl.load(chosen_value)
        keep = tl.load(done)
        if keep == 0:
            keep = _passes(words, flags, floor, before, _mass(masses, splits), _mass(masses + splits, splits))
            if flags & _HAS_TOP_P:
                settled = keep
        if keep != 0:
            value = before
            winner = tl.load(chosen_id)
    return settled, value, winner


@triton.jit
def _passes(words, flags, floor, value, total, ahead):
    """Whether a token with this much mass ahead of it is kept."""
    kept = 1
    if value < floor:
        kept = 0
    if flags & _HAS_TOP_P:
        if ahead.to(tl.float64) >= _double(words, _TOP_P) * total.to(tl.float64):
            kept = 0
    return kept


# ---- the launches


@triton.jit(do_not_specialize=["splits"])
def _scan(logits, rows, positions, settings, marks, bias, mask, tops, scores, values, ids_out, maxima, collected, vocab,
          span, splits, logits_stride, marks_stride, bias_stride, mask_stride, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
          FAST: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(rows + sample).to(tl.int64)
    position = tl.load(positions + sample)
    words = settings + row * _WORDS
    flags = tl.load(words)
    logits += sample * logits_stride
    if marks is not None:
        marks += row * marks_stride
    if bias is not None:
        bias += row * bias_stride
    if mask is not None:
        mask += row * mask_stride
    low = split * span
    high = tl.minimum(low + span, vocab)
    out = sample * splits + split
    temperature = 1.0  # a record of zeros is greedy
    if flags & _SAMPLED:
        temperature = _float(words, _TEMPERATURE)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.full([BLOCK], _NO_ID, tl.int32)
    if flags & _HAS_TOP_K:
        for start in tl.range(low, high, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            x = _logits_at(logits, ids, ids < high, words, flags, position, marks, bias, mask)
            peak = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
        groups = tl.max(tl.reshape(peak, [GROUPS, BLOCK // GROUPS]), 1)
        tl.store(maxima + out * GROUPS + tl.arange(0, GROUPS), tl.div_rn(groups, temperature))
        if split == 0:
            tl.store(collected + sample, 0)
    elif flags & _SAMPLED:
        inverse = 1.0 / temperature
        key0, key1 = _noise_key(words, position)
        best = peak
        second = peak
        for start in tl.range(low, high, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            x = _logits_at(logits, ids, ids < high, words, flags, position, marks, bias, mask)
            peak = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
            score = _rough_score(x, inverse, ids, key0, key1, FAST)
            second = tl.maximum(second, tl.minimum(best, score))
            at = tl.where(score > best, ids, at)
            best = tl.maximum(best, score)
        score, value, winner = _settle(best, second, at, float("-inf"), _NO_ID, float("-inf"), low, high, logits,
                                       words, flags, position, marks, bias, mask, key0, key1, BLOCK)  # fmt: skip
        tl.store(scores + out, score)
        tl.store(values + out, value)
        tl.store(ids_out + out, winner)
    else:
        best = peak
        for start in tl.range(low, high, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            x = _logits_at(logits, ids, ids < high, words, flags, position, marks, bias, mask)
            at = tl.where(x > best, ids, at)
            best = tl.maximum(best, x)
            peak = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
        score, winner = _first(best, at)
        tl.store(scores + out, score)
        tl.store(values + out, score)
        tl.store(ids_out + out, winner)
    top = tl.div_rn(tl.max(peak, 0), temperature)
    finite = tl.min((peak < float("inf")).to(tl.int32), 0)  # false for NaN as well
    tl.store(tops + out, tl.where(finite != 0, top, float("inf")))


@triton.jit(do_not_specialize=["splits", "groups"])
def _round(logits, rows, positions, settings, marks, bias, mask, tops, scores, values, ids_in, masses, done, chosen_value,
           chosen_id, next_scores, next_values, next_ids, next_masses, next_done, next_value, next_id, maxima, collected,
           collected_values, collected_ids, vocab, span, splits, groups, logits_stride, marks_stride, bias_stride,
           mask_stride, FIRST: tl.constexpr, GROUPS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
           FAST: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(rows + sample).to(tl.int64)
    words = settings + row * _WORDS
    flags = tl.load(words)
    top = _top(tops + sample * splits, splits)
    if (flags & (_HAS_TOP_K | _HAS_TOP_P | _HAS_MIN_P) != 0) & (top < float("inf")):
        position = tl.load(positions + sample)
        logits += sample * logits_stride
        if marks is not None:
            marks += row * marks_stride
        if bias is not None:
            bias += row * bias_stride
        if mask is not None:
            mask += row * mask_stride
        low = split * span
        high = tl.minimum(low + span, vocab)
        if flags & _HAS_TOP_K:
            if FIRST:
                _collect(low, high, logits, words, flags, position, marks, bias, mask,
                         maxima + sample * groups, groups, collected + sample, collected_values + sample * CAPACITY,
                         collected_ids + sample * CAPACITY, GROUPS, CAPACITY, BLOCK, STAGES)  # fmt: skip
        else:
            first = sample * splits
            floor = _floor(words, flags, top)
            settled, value, token = _resolve(words, flags, floor, scores + first, values + first, ids_in + first,
                                             masses + first * 2, done + sample, chosen_value + sample, chosen_id + sample,
                                             splits, FIRST)  # fmt: skip
            if split == 0:
                tl.store(next_done + sample, settled)
                tl.store(next_value + sample, value)
                tl.store(next_id + sample, token)
            if settled == 0:
                key0, key1 = _noise_key(words, position)
                total, ahead, score, x, winner = _pass(value, token, floor, top, low, high, logits, words, flags,
                                                       position, marks, bias, mask, key0, key1, BLOCK, STAGES, FAST)  # fmt: skip
                tl.store(next_masses + first * 2 + split, total)
                tl.store(next_masses + first * 2 + splits + split, ahead)
                tl.store(next_scores + first + split, score)
                tl.store(next_values + first + split, x)
                tl.store(next_ids + first + split, winner)


@triton.jit
def _collect(low, high, logits, words, flags, position, marks, bias, mask, maxima, groups, collected,
             collected_values, collected_ids, GROUPS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """Every id that may be among the first k, in any order: the k-th best group's maximum is no better than the k-th id.

    Where there are more than CAPACITY, `collected` says so, and not all are stored.
    """
    temperature = _float(words, _TEMPERATURE)
    at = tl.arange(0, GROUPS)
    keys = _ordered(tl.load(maxima + at, mask=at < groups, other=float("-inf")))
    bound = _kth(keys.to(tl.uint64), tl.load(words + _TOP_K), 32)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < high
        x = tl.div_rn(_logits_at(logits, ids, inside, words, flags, position, marks, bias, mask), temperature)
        wanted = (_ordered(x).to(tl.uint64) >= bound) & (x > float("-inf"))
        count = tl.sum(wanted.to(tl.int32), 0)
        if count > 0:
            place = tl.atomic_add(collected, count, sem="relaxed") + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(collected_values + place, x, mask=wanted & (place < CAPACITY))
            tl.store(collected_ids + place, ids, mask=wanted & (place < CAPACITY))


@triton.jit
def _kth(keys, k, BITS: tl.constexpr):
    """The k-th largest of some uint64 keys below 2^BITS, bit by bit from the top; 0 if there are fewer."""
    found = tl.zeros([], tl.uint64)
    bit = tl.full([], 1, tl.uint64) << (BITS - 1)
    for _ in range(BITS):
        trial = found | bit
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= k, trial, found)
        bit = bit >> 1
    return found


@triton.jit
def _rank_key(x, ids, ID_BITS: tl.constexpr):
    """One integer in the order (value descending, id ascending), largest first."""
    return (_ordered(x).to(tl.uint64) << ID_BITS) | ((1 << ID_BITS) - 1 - ids).to(tl.uint64)


@triton.jit
def _draw_collected(count, top, words, flags, key0, key1, values, ids_in, CAPACITY: tl.constexpr, ID_BITS: tl.constexpr):
    """A row with top_k whose candidates fit: ranked, filtered and drawn from in registers."""
    lanes = tl.arange(0, CAPACITY)
    inside = lanes < count
    x = tl.load(values + lanes, mask=inside, other=float("-inf"))
    ids = tl.load(ids_in + lanes, mask=inside, other=0)
    keys = tl.where(inside, _rank_key(x, ids, ID_BITS), 0)
    kept = inside & (keys >= _kth(keys, tl.load(words + _TOP_K), 32 + ID_BITS))
    weights = tl.where(kept, _fixed(tl.exp(x.to(tl.float64) - top.to(tl.float64))), 0)
    total = tl.sum(weights, 0)
    floor = _floor(words, flags, top)
    scores = tl.where(kept & (x >= floor), x + _gumbel(ids, key0, key1), float("-inf"))
    token = 0
    settled = 0
    while settled == 0:
        _, token = _first(scores, ids)
        value = tl.max(tl.where(inside & (ids == token), x, float("-inf")), 0)
        before = _is_ahead(x, ids, value, token)
        settled = _passes(words, flags, floor, value, total, tl.sum(tl.where(before, weights, 0), 0))
        scores = tl.where(before, scores, float("-inf"))
    return token


@triton.jit
def _kth_of_row(logits, vocab, words, flags, position, marks, bias, mask, BLOCK: tl.constexpr, STAGES: tl.constexpr,
                ID_BITS: tl.constexpr):  # fmt: skip
    """As `_kth` over a whole row's `_rank_key`s; back as (scaled logit, id)."""
    temperature = _float(words, _TEMPERATURE)
    k = tl.load(words + _TOP_K)
    found = tl.zeros([], tl.uint64)
    bit = tl.full([], 1, tl.uint64) << (31 + ID_BITS)
    for _ in range(32 + ID_BITS):
        trial = found | bit
        count = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            inside = ids < vocab
            x = tl.div_rn(_logits_at(logits, ids, inside, words, flags, position, marks, bias, mask), temperature)
            count += (inside & (_rank_key(x, ids, ID_BITS) >= trial)).to(tl.int32)
        found = tl.where(tl.sum(count, 0) >= k, trial, found)
        bit = bit >> 1
    key = (found >> ID_BITS).to(tl.uint32).to(tl.int32, bitcast=True)
    value = (key ^ ((~key >> 31) | -2147483648)).to(tl.float32, bitcast=True)
    return value, (1 << ID_BITS) - 1 - (found & ((1 << ID_BITS) - 1)).to(tl.int32)


@triton.jit(do_not_specialize=["splits"])
def _finish(logits, rows, positions, settings, marks, bias, mask, tops, scan_scores, scan_values, scan_ids, scores, values,
            ids_in, masses, done, chosen_value, chosen_id, collected, collected_values, collected_ids, out_tokens,
            last_token, vocab, splits, logits_stride, marks_stride, bias_stride, mask_stride, FIRST: tl.constexpr,
            CAPACITY: tl.constexpr, ID_BITS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + sample).to(tl.int64)
    words = settings + row * _WORDS
    flags = tl.load(words)
    top = _top(tops + sample * splits, splits)
    token = _NO_TOKEN
    logits += sample * logits_stride
    if marks is not None:
        marks += row * marks_stride
    if bias is not None:
        bias += row * bias_stride
    if mask is not None:
        mask += row * mask_stride
    if (top < float("inf")) & (top > float("-inf")):
        position = tl.load(positions + sample)
        key0, key1 = _noise_key(words, position)
        floor = _floor(words, flags, top)
        first = sample * splits
        value = float("-inf")
        settled = 0
        count = 0
        known = tl.zeros([], tl.int64)  # the mass that top_p is a share of, where it is not that of all
        if flags & _HAS_TOP_K:
            count = CAPACITY + 1
            if not FIRST:
                count = tl.load(collected + sample)
            if count <= CAPACITY:
                token = _draw_collected(count, top, words, flags, key0, key1, collected_values + sample * CAPACITY,
                                        collected_ids + sample * CAPACITY, CAPACITY, ID_BITS)  # fmt: skip
                settled = 1
            else:
                value, token = _kth_of_row(logits, vocab, words, flags, position, marks, bias, mask, BLOCK, STAGES,
                                           ID_BITS)  # fmt: skip
                token += 1  # all that is kept is ahead of (value, token)
        elif flags & (_HAS_TOP_P | _HAS_MIN_P):
            settled, value, token = _resolve(words, flags, floor, scores + first, values + first, ids_in + first,
                                             masses + first * 2, done + sample, chosen_value + sample, chosen_id + sample,
                                             splits, FIRST)  # fmt: skip
        else:
            value, token = _winner(scan_scores + first, scan_values + first, scan_ids + first, splits)
            settled = 1
        while settled == 0:
            total, ahead, _, x, winner = _pass(value, token, floor, top, 0, vocab, logits, words, flags, position,
                                               marks, bias, mask, key0, key1, BLOCK, STAGES, FAST)  # fmt: skip
            if (flags & _HAS_TOP_K != 0) & (known == 0):
                known = ahead
            else:
                total = tl.where(known > 0, known, total)
                settled = _passes(words, flags, floor, value, total, ahead)
            if settled == 0:
                value = x
                token = winner
        if marks is not None:
            if flags & _PENALISED:
                tl.atomic_add(marks + token, 1, sem="relaxed")
    tl.store(out_tokens + sample, token)
    tl.store(last_token + row, tl.maximum(token, 0))


# ---- for callers


@dataclass(frozen=True, slots=True)
class Tables:
    """What changes logits, by resident row; a table that is None is never read, whatever the flags say.

    marks: [rows, vocabulary] int32. bias: [rows, vocabulary] float32. mask: [rows, words] int32, bit id % 32 of word id // 32.
    """

    marks: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """How `sample` is launched.

    splits, block: powers of two. rounds: launches that look into filtered rows. stages: tiles on their way to a program.
    """

    splits: int
    block: int = 1024
    warps: int = 4
    finish_block: int = 2048
    finish_warps: int = 8
    registers: int | None = None
    stages: int = 4
    rounds: int = ROUNDS


def geometry(samples: int, processors: int = 132) -> Geometry:
    """Enough programs for eight on each multiprocessor, and splits of a few blocks at least."""
    wanted = max(1, processors * 8 // max(1, samples))
    return Geometry(splits=min(MAX_SPLITS, 1 << (wanted.bit_length() - 1)))


class Workspace:
    """Scratch memory for steps of up to `samples` samples, which may share it one after the other.

    rounds: the most that a `Geometry` may have. capacity: of ids collected for a row with top_k, a power of two.
    """

    def __init__(self, samples: int, device: torch.device, rounds: int = ROUNDS, capacity: int = CAPACITY) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        whole = samples * MAX_SPLITS
        self.samples = samples
        self.capacity = capacity
        self.tops = empty(whole)
        self.scores = empty(rounds + 1, whole)
        self.values = empty(rounds + 1, whole)
        self.ids = empty(rounds + 1, whole, dtype=torch.int32)
        self.masses = empty(rounds + 1, whole * 2, dtype=torch.int64)
        self.done = empty(rounds + 1, samples, dtype=torch.int32)
        self.chosen_value = empty(rounds + 1, samples)
        self.chosen_id = empty(rounds + 1, samples, dtype=torch.int32)
        self.maxima = empty(samples * GROUPS)
        self.collected = empty(samples, dtype=torch.int32)
        self.collected_values = empty(samples * capacity)
        self.collected_ids = empty(samples * capacity, dtype=torch.int32)

    def found(self, launch: int) -> tuple[Tensor, ...]:
        """What a launch (0: the scan) leaves behind about rows without top_k."""
        states = (self.scores, self.values, self.ids, self.masses, self.done, self.chosen_value, self.chosen_id)
        return tuple(state[launch] for state in states)


def sample(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    settings: Tensor,
    tables: Tables,
    out_tokens: Tensor,
    last_token: Tensor,
    *,
    vocab_size: int,
    workspace: Workspace,
    plan: Geometry | None = None,
) -> None:
    """Draws a token for each sample, as `workers.sampling.sampler.Sampler` does. Waits for nothing, allocates nothing.

    logits: [samples, columns] bfloat16, float16 or float32, columns next to each other; left as they were; columns past
    vocab_size are not read. rows: [samples] int32, the resident row of each; a row that has a sequence may come once.
    positions: [samples] int32, the index that the token will have in its sequence. settings: [rows, WORDS] int32, see
    `workers.sampling.settings`. Written: out_tokens [samples], NO_TOKEN where the edited logits hold NaN or infinity or
    nothing finite; last_token [rows], the same with 0 for NO_TOKEN; the count in `tables.marks` of rows with penalties.
    """
    samples = len(rows)
    if samples > workspace.samples:
        raise ValueError(f"{samples} samples in a step, but the workspace was made for {workspace.samples}")
    plan = plan or geometry(samples)
    fast = logits.is_cuda
    splits, block = plan.splits, plan.block
    span = triton.cdiv(triton.cdiv(vocab_size, splits), block) * block
    groups = min(block, GROUPS // splits)
    edits = (tables.marks, tables.bias, tables.mask)
    strides = (logits.stride(0), *(0 if table is None else table.stride(0) for table in edits))
    inputs = (logits, rows, positions, settings, *edits, workspace.tops)
    collected = (workspace.collected, workspace.collected_values, workspace.collected_ids)
    exact = {"num_warps": plan.warps, "enable_fp_fusion": False, "maxnreg": plan.registers}
    _scan[(samples, splits)](
        *inputs, *workspace.found(0)[:3], workspace.maxima, workspace.collected, vocab_size, span, splits, *strides,
        GROUPS=groups, BLOCK=block, FAST=fast, STAGES=plan.stages, **exact,
    )  # fmt: skip
    for launch in range(plan.rounds):
        _round[(samples, splits)](
            *inputs, *workspace.found(launch), *workspace.found(launch + 1), workspace.maxima, *collected, vocab_size, span,
            splits, splits * groups, *strides, FIRST=launch == 0, GROUPS=GROUPS, CAPACITY=workspace.capacity, BLOCK=block,
            FAST=fast, STAGES=plan.stages, **exact,
        )  # fmt: skip
    _finish[(samples,)](
        *inputs, *workspace.found(0)[:3], *workspace.found(plan.rounds), *collected, out_tokens, last_token, vocab_size,
        splits, *strides, FIRST=plan.rounds == 0, CAPACITY=workspace.capacity, ID_BITS=max(1, vocab_size - 1).bit_length(),
        BLOCK=plan.finish_block, FAST=fast, STAGES=plan.stages, num_warps=plan.finish_warps, enable_fp_fusion=False,
    )  # fmt: skip
