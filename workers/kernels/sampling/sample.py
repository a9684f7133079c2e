"""The next token of every sample in a fixed number of launches, for any mixture of settings, and without a word to the host.

    scan    (samples, splits)  edit, scale, add noise: each split's best score; rows with top_k: maxima of groups of ids
    round   (samples, splits)  rows with top_p or min_p: is the winner inside? if not, the best of those ahead of it
                               rows with top_k: the ids that may be among the first k are collected
    finish  (samples)          merge, decide among what was collected, count the token, write it

Just what filtering first would give, by rejection (as in FlashInfer's sampling kernels): a winner with too much ahead of it
is out, and so is all behind it. Rows that no round has settled are settled by `finish`, in a loop of its own. A token depends
on its row's logits and settings alone, to the last bit: noise and scores are recomputed exactly where approximations are
close, and probabilities are summed in fixed point, where the order does not count.

Imports torch and Triton. Reads records as `record` has them; allocates nothing in `sample`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

# ruff: noqa: SIM102
# What the compiler decides stands in an `if` of its own, around what the device decides.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scheduler.protocol.messages import NO_TOKEN
from workers.kernels.sampling.draw import (
    MAX_SPLITS,
    collect,
    draw_collected,
    is_kept,
    kth_of_row,
    look_ahead,
    resolve,
    settle,
    top_of_splits,
    winner_of_splits,
)
from workers.kernels.sampling.logits import (
    HAS_MIN_P,
    HAS_TOP_K,
    HAS_TOP_P,
    NO_ID,
    PENALISED,
    SAMPLED,
    TEMPERATURE,
    WORDS,
    first_best,
    load_float,
    logits_at,
    min_p_floor,
    noise_key,
    rough_score,
)

GROUPS = 4096
"""Groups of ids in a row, at most, whose maxima bound the k-th best."""
CAPACITY = 2048
"""Ids that can be collected for a row with top_k; more, for a large top_k or many ties, are found in passes over the row."""
ROUNDS = 2

NONE = tl.constexpr(NO_TOKEN)


# ---- the launches


@triton.jit(do_not_specialize=["splits"])
def _scan(logits, rows, positions, settings, marks, bias, mask, tops, scores, values, ids_out, maxima, collected, vocab,
          span, splits, logits_stride, marks_stride, bias_stride, mask_stride, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
          FAST: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(rows + sample).to(tl.int64)
    position = tl.load(positions + sample)
    words = settings + row * WORDS
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
    if flags & SAMPLED:
        temperature = load_float(words, TEMPERATURE)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.full([BLOCK], NO_ID, tl.int32)
    if flags & HAS_TOP_K:
        for start in tl.range(low, high, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            x = logits_at(logits, ids, ids < high, words, flags, position, marks, bias, mask)
            peak = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
        groups = tl.max(tl.reshape(peak, [GROUPS, BLOCK // GROUPS]), 1)
        tl.store(maxima + out * GROUPS + tl.arange(0, GROUPS), tl.div_rn(groups, temperature))
        if split == 0:
            tl.store(collected + sample, 0)
    elif flags & SAMPLED:
        inverse = 1.0 / temperature
        key0, key1 = noise_key(words, position)
        best = peak
        second = peak
        for start in tl.range(low, high, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            x = logits_at(logits, ids, ids < high, words, flags, position, marks, bias, mask)
            peak = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
            score = rough_score(x, inverse, ids, key0, key1, FAST)
            second = tl.maximum(second, tl.minimum(best, score))
            at = tl.where(score > best, ids, at)
            best = tl.maximum(best, score)
        score, value, winner = settle(best, second, at, float("-inf"), NO_ID, float("-inf"), low, high, logits,
                                      words, flags, position, marks, bias, mask, key0, key1, BLOCK)  # fmt: skip
        tl.store(scores + out, score)
        tl.store(values + out, value)
        tl.store(ids_out + out, winner)
    else:
        best = peak
        for start in tl.range(low, high, BLOCK, num_stages=STAGES):
            ids = start + tl.arange(0, BLOCK)
            x = logits_at(logits, ids, ids < high, words, flags, position, marks, bias, mask)
            at = tl.where(x > best, ids, at)
            best = tl.maximum(best, x)
            peak = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
        score, winner = first_best(best, at)
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
    words = settings + row * WORDS
    flags = tl.load(words)
    top = top_of_splits(tops + sample * splits, splits)
    if (flags & (HAS_TOP_K | HAS_TOP_P | HAS_MIN_P) != 0) & (top < float("inf")):
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
        if flags & HAS_TOP_K:
            if FIRST:
                collect(low, high, logits, words, flags, position, marks, bias, mask,
                        maxima + sample * groups, groups, collected + sample, collected_values + sample * CAPACITY,
                        collected_ids + sample * CAPACITY, GROUPS, CAPACITY, BLOCK, STAGES)  # fmt: skip
        else:
            first = sample * splits
            floor = min_p_floor(words, flags, top)
            settled, value, token = resolve(words, flags, floor, scores + first, values + first, ids_in + first,
                                            masses + first * 2, done + sample, chosen_value + sample, chosen_id + sample,
                                            splits, FIRST)  # fmt: skip
            if split == 0:
                tl.store(next_done + sample, settled)
                tl.store(next_value + sample, value)
                tl.store(next_id + sample, token)
            if settled == 0:
                key0, key1 = noise_key(words, position)
                total, ahead, score, x, winner = look_ahead(
                    value, token, floor, top, low, high, logits, words, flags, position, marks, bias, mask, key0, key1,
                    BLOCK, STAGES, FAST,
                )  # fmt: skip
                tl.store(next_masses + first * 2 + split, total)
                tl.store(next_masses + first * 2 + splits + split, ahead)
                tl.store(next_scores + first + split, score)
                tl.store(next_values + first + split, x)
                tl.store(next_ids + first + split, winner)


@triton.jit(do_not_specialize=["splits"])
def _finish(logits, rows, positions, settings, marks, bias, mask, tops, scan_scores, scan_values, scan_ids, scores, values,
            ids_in, masses, done, chosen_value, chosen_id, collected, collected_values, collected_ids, out_tokens,
            last_token, vocab, splits, logits_stride, marks_stride, bias_stride, mask_stride, FIRST: tl.constexpr,
            CAPACITY: tl.constexpr, ID_BITS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + sample).to(tl.int64)
    words = settings + row * WORDS
    flags = tl.load(words)
    top = top_of_splits(tops + sample * splits, splits)
    token = NONE
    logits += sample * logits_stride
    if marks is not None:
        marks += row * marks_stride
    if bias is not None:
        bias += row * bias_stride
    if mask is not None:
        mask += row * mask_stride
    if (top < float("inf")) & (top > float("-inf")):
        position = tl.load(positions + sample)
        key0, key1 = noise_key(words, position)
        floor = min_p_floor(words, flags, top)
        first = sample * splits
        value = float("-inf")
        settled = 0
        count = 0
        known = tl.zeros([], tl.int64)  # the mass that top_p is a share of, where it is not that of all
        if flags & HAS_TOP_K:
            count = CAPACITY + 1
            if not FIRST:
                count = tl.load(collected + sample)
            if count <= CAPACITY:
                token = draw_collected(count, top, words, flags, key0, key1, collected_values + sample * CAPACITY,
                                       collected_ids + sample * CAPACITY, CAPACITY, ID_BITS)  # fmt: skip
                settled = 1
            else:
                value, token = kth_of_row(logits, vocab, words, flags, position, marks, bias, mask, BLOCK, STAGES,
                                          ID_BITS)  # fmt: skip
                token += 1  # all that is kept is ahead of (value, token)
        elif flags & (HAS_TOP_P | HAS_MIN_P):
            settled, value, token = resolve(words, flags, floor, scores + first, values + first, ids_in + first,
                                            masses + first * 2, done + sample, chosen_value + sample, chosen_id + sample,
                                            splits, FIRST)  # fmt: skip
        else:
            value, token = winner_of_splits(scan_scores + first, scan_values + first, scan_ids + first, splits)
            settled = 1
        while settled == 0:
            total, ahead, _, x, winner = look_ahead(value, token, floor, top, 0, vocab, logits, words, flags, position,
                                                    marks, bias, mask, key0, key1, BLOCK, STAGES, FAST)  # fmt: skip
            if (flags & HAS_TOP_K != 0) & (known == 0):
                known = ahead
            else:
                total = tl.where(known > 0, known, total)
                settled = is_kept(words, flags, floor, value, total, ahead)
            if settled == 0:
                value = x
                token = winner
        if marks is not None:
            if flags & PENALISED:
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
class SampleGeometry:
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


def geometry(samples: int, processors: int = 132) -> SampleGeometry:
    """Enough programs for eight on each multiprocessor, and splits of a few blocks at least."""
    wanted = max(1, processors * 8 // max(1, samples))
    return SampleGeometry(splits=min(MAX_SPLITS, 1 << (wanted.bit_length() - 1)))


class Workspace:
    """Scratch memory for steps of up to `samples` samples, which may share it one after the other.

    rounds: the most that a `SampleGeometry` may have. capacity: of ids collected for a row with top_k, a power of two.
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
    plan: SampleGeometry | None = None,
) -> None:
    """Draws a token for each sample, as `workers.sampling.sampler.Sampler` does. Waits for nothing, allocates nothing.

    logits: [samples, columns] bfloat16, float16 or float32, columns next to each other; left as they were; columns past
    vocab_size are not read. rows: [samples] int32, the resident row of each; a row that has a sequence may come once.
    positions: [samples] int32, the index that the token will have in its sequence. settings: [rows, WORDS] int32, see
    `record`. Written: out_tokens [samples], NO_TOKEN where the edited logits hold NaN or infinity or
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
