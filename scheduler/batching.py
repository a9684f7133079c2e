"""The tokens of one step: decodes first, then prefill in chunks. No phases, only tokens known against tokens computed.

Pure NumPy over the rows of a resident batch; runs on every rank of a group with the same result.
After vLLM v1's scheduler and Sarathi-Serve (chunked prefill, arXiv 2403.02310).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

OTHERS_SHARE = 4
"""One part in so many of a step's prefill goes to whoever has least left, if that is not the oldest.

So those behind a long prompt delay it by a third at most, and one of them waits no longer than four times what it and those
with less left would take alone. With 2 instead short ones wait less and, under overload, the longest ones much longer.
"""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """rows: [n] decodes (one token) first, then chunks, oldest first. counts: [n] tokens to compute for each.

    Invariant: every count is at least 1, their sum is at most max_num_batched_tokens, and no row computes past
    what it was granted.
    """

    rows: Ints
    counts: Ints
    decodes: int


def plan_step(known: Ints, computed: Ints, granted: Ints, age: Ints, max_num_batched_tokens: int) -> StepPlan:
    """Chooses what to compute next.

    known, computed: [rows] tokens of each sequence, and how many of them have KV; equal for an empty row.
    granted: [rows] tokens that its granted blocks hold: a row without one that is free sits this step out.
    age: [rows] smaller is older. max_num_batched_tokens: in a step.
    """
    wanted = np.minimum(known, granted) - computed
    one = np.flatnonzero((known - computed == 1) & (wanted == 1))
    more = np.flatnonzero((known - computed > 1) & (wanted > 0))
    if len(one) > max_num_batched_tokens:
        one = one[np.argsort(age[one], kind="stable")[:max_num_batched_tokens]]
    if not len(more) or len(one) >= max_num_batched_tokens:
        return StepPlan(one, np.ones(len(one), np.int64), len(one))
    more = more[np.argsort(age[more], kind="stable")]
    counts = _share(wanted[more], (known - computed)[more], max_num_batched_tokens - len(one))
    taken = counts > 0
    rows = np.concatenate([one, more[taken]])
    return StepPlan(rows, np.concatenate([np.ones(len(one), np.int64), counts[taken]]), len(one))


def _share(wanted: Ints, left: Ints, room: int) -> Ints:
    """[n] tokens for each prefill, oldest first: most for the oldest, the rest by what is left.

    room: tokens that the step has for them.
    wanted: [n] tokens that each could compute now. left: [n] tokens until its first one is sampled.
    """
    if len(wanted) == 1:
        return np.minimum(wanted, room)
    sure = min(int(wanted[0]), room - room // OTHERS_SHARE)
    more = wanted.copy()
    more[0] -= sure
    order = np.argsort(left, kind="stable")
    before = np.cumsum(more[order]) - more[order]
    counts = np.empty_like(wanted)
    counts[order] = np.clip(room - sure - before, 0, more[order])
    counts[0] += sure
    return counts
