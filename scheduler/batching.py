"""One step's token budget: decodes first, then prefill in chunks. No phases, only tokens known against tokens computed.

Pure NumPy over the rows of a resident batch; runs on every rank of a group with the same result.
After vLLM v1's scheduler and Sarathi-Serve (chunked prefill, arXiv 2403.02310).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """rows: [n] decodes (one token) first, then chunks, oldest first. counts: [n] tokens to compute for each.

    Invariant: every count is at least 1, their sum is within the budget, and no row computes past its granted slots.
    """

    rows: Ints
    counts: Ints
    decodes: int


def plan_step(known: Ints, computed: Ints, slots: Ints, age: Ints, budget: int) -> StepPlan:
    """Chooses what to compute next.

    known, computed: [rows] tokens of each sequence, and how many of them have KV; equal for an empty row.
    slots: [rows] tokens that its granted pages hold: a row without a free slot sits this step out.
    age: [rows] smaller is older. budget: tokens in a step.
    """
    wanted = np.minimum(known, slots) - computed
    one = np.flatnonzero((known - computed == 1) & (wanted == 1))
    more = np.flatnonzero((known - computed > 1) & (wanted > 0))
    if len(one) > budget:
        one = one[np.argsort(age[one], kind="stable")[:budget]]
    if not len(more) or len(one) >= budget:
        return StepPlan(one, np.ones(len(one), np.int64), len(one))
    more = more[np.argsort(age[more], kind="stable")]
    before = np.cumsum(wanted[more]) - wanted[more]
    left = budget - len(one) - before
    counts = np.minimum(wanted[more], left)[left > 0]
    rows = np.concatenate([one, more[: len(counts)]])
    return StepPlan(rows, np.concatenate([np.ones(len(one), np.int64), counts]), len(one))
