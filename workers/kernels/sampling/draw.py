"""Who wins among a row's ids: over the tiles of a split, over the splits, and among what the filters keep.

Device functions only, each for one program. Imports Triton and `logits`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

# ruff: noqa: SIM102
# What the compiler decides stands in an `if` of its own, around what the device decides.

import triton
import triton.language as tl

from workers.kernels.sampling.logits import (
    HAS_TOP_P,
    NO_ID,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    first_best,
    fixed_point,
    gumbel,
    is_ahead,
    load_double,
    load_float,
    logits_at,
    min_p_floor,
    ordered,
    rough_score,
)

MAX_SPLITS = 64

SPLITS_READ = tl.constexpr(MAX_SPLITS)
CLOSE = tl.constexpr(4e-5)  # scores this near to each other, more where they are large, are compared exactly


# ---- many tiles


@triton.jit
def settle(best, second, at, value, token, floor, low, high, logits, words, flags, position, marks, bias, mask,
           key0, key1, BLOCK: tl.constexpr):  # fmt: skip
    """The best exact score among [low, high), from each lane's best rough one: (score, scaled logit, id).

    Where a lane's second came near, another than its best may be the winner: then every score is computed exactly.
    """
    temperature = load_float(words, TEMPERATURE)
    valid = best > float("-inf")
    x = tl.div_rn(logits_at(logits, at, valid, words, flags, position, marks, bias, mask), temperature)
    scores = tl.where(valid, x + gumbel(at, key0, key1), float("-inf"))
    peak = tl.max(best, 0)
    if tl.max(second, 0) >= peak - (CLOSE + 2e-6 * tl.abs(peak)):
        scores = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(low, high, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            inside = ids < high
            tile = tl.div_rn(logits_at(logits, ids, inside, words, flags, position, marks, bias, mask), temperature)
            rivals = tl.where(is_ahead(tile, ids, value, token) & (tile >= floor), tile + gumbel(ids, key0, key1),
                              float("-inf"))  # fmt: skip
            at = tl.where(rivals > scores, ids, at)
            x = tl.where(rivals > scores, tile, x)
            scores = tl.maximum(scores, rivals)
    score, winner = first_best(scores, at)
    return score, tl.max(tl.where((at == winner) & (scores == score), x, float("-inf")), 0), winner


@triton.jit
def look_ahead(value, token, floor, top, low, high, logits, words, flags, position, marks, bias, mask, key0, key1,
               BLOCK: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Over [low, high): the mass of all, the mass ahead of (value, token), and the best ahead of it and not below floor.

    Returns (total, ahead, score, scaled logit, id); masses are int64, relative to the weight of `top`.
    """
    temperature = load_float(words, TEMPERATURE)
    inverse = 1.0 / temperature
    total = tl.zeros([BLOCK], tl.int64)
    ahead = tl.zeros([BLOCK], tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    second = best
    at = tl.full([BLOCK], NO_ID, tl.int32)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < high
        raw = logits_at(logits, ids, inside, words, flags, position, marks, bias, mask)
        x = tl.div_rn(raw, temperature)
        weight = fixed_point(tl.exp(x - top))
        before = is_ahead(x, ids, value, token)
        total += weight
        ahead += tl.where(before, weight, 0)
        score = tl.where(before & (x >= floor), rough_score(raw, inverse, ids, key0, key1, FAST), float("-inf"))
        second = tl.maximum(second, tl.minimum(best, score))
        at = tl.where(score > best, ids, at)
        best = tl.maximum(best, score)
    score, x, winner = settle(best, second, at, value, token, floor, low, high, logits, words, flags, position,
                              marks, bias, mask, key0, key1, BLOCK)  # fmt: skip
    return tl.sum(total, 0), tl.sum(ahead, 0), score, x, winner


@triton.jit
def top_of_splits(tops, splits):
    """The highest scaled logit of a row; +inf if any is not finite."""
    at = tl.arange(0, SPLITS_READ)
    return tl.max(tl.load(tops + at, mask=at < splits, other=float("-inf")), 0)


@triton.jit
def winner_of_splits(scores, values, ids, splits):
    """The best of the splits of one row: (scaled logit, id)."""
    at = tl.arange(0, SPLITS_READ)
    inside = at < splits
    found = tl.load(ids + at, mask=inside, other=NO_ID)
    _, winner = first_best(tl.load(scores + at, mask=inside, other=float("-inf")), found)
    value = tl.load(values + at, mask=inside, other=float("-inf"))
    return tl.max(tl.where(found == winner, value, float("-inf")), 0), winner


@triton.jit
def _mass(masses, splits):
    at = tl.arange(0, SPLITS_READ)
    return tl.sum(tl.load(masses + at, mask=at < splits, other=0), 0)


@triton.jit
def resolve(words, flags, floor, scores, values, ids, masses, done, chosen_value, chosen_id, splits,
            FIRST: tl.constexpr):  # fmt: skip
    """What the last launch has found of a row without top_k: (settled, scaled logit, id) of its present winner."""
    value, winner = winner_of_splits(scores, values, ids, splits)
    settled = 1
    if FIRST:
        if flags & HAS_TOP_P:
            settled = 0
        if value < floor:
            settled = 0
    else:
        before = tl.load(chosen_value)
        keep = tl.load(done)
        if keep == 0:
            keep = is_kept(words, flags, floor, before, _mass(masses, splits), _mass(masses + splits, splits))
            if flags & HAS_TOP_P:
                settled = keep
        if keep != 0:
            value = before
            winner = tl.load(chosen_id)
    return settled, value, winner


@triton.jit
def is_kept(words, flags, floor, value, total, ahead):
    """Whether a token with this much mass ahead of it is kept."""
    kept = 1
    if value < floor:
        kept = 0
    if flags & HAS_TOP_P:
        if ahead.to(tl.float64) >= load_double(words, TOP_P) * total.to(tl.float64):
            kept = 0
    return kept


# ---- rows with top_k


@triton.jit
def collect(low, high, logits, words, flags, position, marks, bias, mask, maxima, groups, collected,
            collected_values, collected_ids, GROUPS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """Every id that may be among the first k, in any order: the k-th best group's maximum is no better than the k-th id.

    Where there are more than CAPACITY, `collected` says so, and not all are stored.
    """
    temperature = load_float(words, TEMPERATURE)
    at = tl.arange(0, GROUPS)
    keys = ordered(tl.load(maxima + at, mask=at < groups, other=float("-inf")))
    bound = kth(keys.to(tl.uint64), tl.load(words + TOP_K), 32)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < high
        x = tl.div_rn(logits_at(logits, ids, inside, words, flags, position, marks, bias, mask), temperature)
        wanted = (ordered(x).to(tl.uint64) >= bound) & (x > float("-inf"))
        count = tl.sum(wanted.to(tl.int32), 0)
        if count > 0:
            place = tl.atomic_add(collected, count, sem="relaxed") + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(collected_values + place, x, mask=wanted & (place < CAPACITY))
            tl.store(collected_ids + place, ids, mask=wanted & (place < CAPACITY))


@triton.jit
def kth(keys, k, BITS: tl.constexpr):
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
    return (ordered(x).to(tl.uint64) << ID_BITS) | ((1 << ID_BITS) - 1 - ids).to(tl.uint64)


@triton.jit
def draw_collected(count, top, words, flags, key0, key1, values, ids_in, CAPACITY: tl.constexpr, ID_BITS: tl.constexpr):
    """A row with top_k whose candidates fit: ranked, filtered and drawn from in registers."""
    lanes = tl.arange(0, CAPACITY)
    inside = lanes < count
    x = tl.load(values + lanes, mask=inside, other=float("-inf"))
    ids = tl.load(ids_in + lanes, mask=inside, other=0)
    keys = tl.where(inside, _rank_key(x, ids, ID_BITS), 0)
    kept = inside & (keys >= kth(keys, tl.load(words + TOP_K), 32 + ID_BITS))
    weights = tl.where(kept, fixed_point(tl.exp(x.to(tl.float64) - top.to(tl.float64))), 0)
    total = tl.sum(weights, 0)
    floor = min_p_floor(words, flags, top)
    scores = tl.where(kept & (x >= floor), x + gumbel(ids, key0, key1), float("-inf"))
    token = 0
    settled = 0
    while settled == 0:
        _, token = first_best(scores, ids)
        value = tl.max(tl.where(inside & (ids == token), x, float("-inf")), 0)
        before = is_ahead(x, ids, value, token)
        settled = is_kept(words, flags, floor, value, total, tl.sum(tl.where(before, weights, 0), 0))
        scores = tl.where(before, scores, float("-inf"))
    return token


@triton.jit
def kth_of_row(logits, vocab, words, flags, position, marks, bias, mask, BLOCK: tl.constexpr, STAGES: tl.constexpr,
               ID_BITS: tl.constexpr):  # fmt: skip
    """As `kth` over a whole row's `_rank_key`s; back as (scaled logit, id)."""
    temperature = load_float(words, TEMPERATURE)
    k = tl.load(words + TOP_K)
    found = tl.zeros([], tl.uint64)
    bit = tl.full([], 1, tl.uint64) << (31 + ID_BITS)
    for _ in range(32 + ID_BITS):
        trial = found | bit
        count = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            inside = ids < vocab
            x = tl.div_rn(logits_at(logits, ids, inside, words, flags, position, marks, bias, mask), temperature)
            count += (inside & (_rank_key(x, ids, ID_BITS) >= trial)).to(tl.int32)
        found = tl.where(tl.sum(count, 0) >= k, trial, found)
        bit = bit >> 1
    key = (found >> ID_BITS).to(tl.uint32).to(tl.int32, bitcast=True)
    value = (key ^ ((~key >> 31) | -2147483648)).to(tl.float32, bitcast=True)
    return value, (1 << ID_BITS) - 1 - (found & ((1 << ID_BITS) - 1)).to(tl.int32)
