"""The resident batch of one rank: what the scheduler's log says, and how far the steps have come. NumPy only.

Every rank of a group keeps the same batch: it applies the same commands before the same steps and sees the same sampled
tokens, so each plans each step by itself and nothing but the commands has to travel. A decode step needs no message at all.

    row            0      1      2  ...      the row is part of the lease, chosen by the scheduler
    known        [ 301    77     0 ...]      tokens, sampled ones included (also those still on the device)
    computed     [ 300    32     0 ...]      tokens whose KV is written once the launched steps are done
    full, narrow                              block tables, of the layers that see all and of the others (`tables`)

Imports `scheduler.protocol`, `scheduler.batching` and `tables`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.batching import Ints, StepPlan, plan_step
from scheduler.protocol.leaders import (
    ROW_MASK,
    Adapted,
    Command,
    Copy,
    Drop,
    End,
    Grant,
    LeaseId,
    Movement,
    Remap,
    Start,
    Trim,
)
from scheduler.protocol.messages import NO_TOKEN, FinishReason, Pooling
from workers.loop.tables import BlockTables

NO_ADAPTER = -1
"""In place of a slot: the row has no LoRA adapter, or none that is resident."""

MEASURED_TOKENS = 256
"""Prompt tokens in a step whose log-probabilities are wanted, at most: each needs the logits of the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A part of a prompt whose log-probabilities a step must bring: those of the token after each of its positions.

    index: in the step. count: the first so many of the positions computed there. most: top entries wanted of each.
    """

    index: int
    count: int
    most: int


@dataclass(frozen=True, slots=True)
class PooledPart:
    """A part of a prompt of which hidden states are wanted.

    index: in the step. start, count: so many of the positions computed there, from that one on. ends: the prompt is whole.
    """

    index: int
    start: int
    count: int
    pooling: Pooling
    ends: bool


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way: who was in it, under which lease, from which token on; `samples` marks who gets a new token. Those of
    `pooled` stand behind the decodes, and get none."""

    plan: StepPlan
    leases: Ints  # [n]
    first: Ints  # [n] position of the first computed token
    samples: npt.NDArray[np.bool_]  # [n]
    measured: tuple[Measured, ...] = ()
    pooled: tuple[PooledPart, ...] = ()

    @property
    def pooled_tokens(self) -> int:
        """Positions whose hidden states are wanted."""
        return sum(part.count for part in self.pooled)


class ResidentBatch:
    """Mutated by `apply`, `launch` and `collect`, in the order of the log and the steps.

    full: of all layers, but where there are `narrow` ones beside layers that see all: those have tables of their own.

    Safety: a step's rows write only to slots of blocks granted to their lease. A lease may end while a step with it is under
    way; that step still writes to its blocks, but any later holder's writes come after it on the same stream.
    """

    def __init__(
        self, max_num_seqs: int, block_size: int, max_num_batched_tokens: int, max_model_len: int, *, narrow: bool = False
    ) -> None:  # fmt: skip
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.applied = 0
        self.ended: str | None = None
        self.vacated: list[int] = []  # rows whose lease has ended, for the executor; emptied by `Rank`
        self.lease = np.full(max_num_seqs, -1, np.int64)
        self.known = np.zeros(max_num_seqs, np.int64)
        self.computed = np.zeros(max_num_seqs, np.int64)
        self.granted = np.zeros(max_num_seqs, np.int64)
        self.limit = np.zeros(max_num_seqs, np.int64)
        width = -(-max_model_len // block_size)
        self.full = BlockTables(max_num_seqs, width)
        self.narrow = BlockTables(max_num_seqs, width) if narrow else None
        self.tokens: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)] * max_num_seqs
        self._least = np.zeros(max_num_seqs, np.int64)  # length from which a stop id ends the sequence
        self._stop_ids = np.full((max_num_seqs, 1), NO_TOKEN, np.int64)  # [rows, width], padded
        self._measured: dict[int, tuple[int, int]] = {}  # row -> (prompt tokens, top entries) while the prompt is measured
        self.adapter = np.full(max_num_seqs, NO_ADAPTER, np.int32)  # its slot; kept by `adapters`, as the next one is
        self.unready: set[int] = set()  # rows whose adapter is not resident: they are in no step
        self._pooling: dict[int, Pooling] = {}  # of rows that have no output, until their prompt is computed

    @property
    def kinds(self) -> list[BlockTables]:
        """Of each kind of layer."""
        return [self.full] if self.narrow is None else [self.full, self.narrow]

    # ---- the log

    def apply(self, command: Command) -> None:
        """Applies the next command of the log. What touches blocks and no row is counted here and done by the rank."""
        self.applied += 1
        if isinstance(command, Start):
            self._start(command)
        elif isinstance(command, End):
            self.ended = command.reason
        elif isinstance(command, Copy | Adapted | Movement) or not self.holds(command.lease):
            pass  # or the lease has ended on this side already
        elif isinstance(command, Grant):
            self._grant(command.lease & ROW_MASK, command)
        elif isinstance(command, Remap):
            self.tables_of(command).replace(command.lease & ROW_MASK, command.index, command.block)
        elif isinstance(command, Drop):
            self._clear(command.lease & ROW_MASK)
        elif isinstance(command, Trim):
            self.tables_of(command).first[command.lease & ROW_MASK] = command.first

    def tables_of(self, command: Remap | Trim) -> BlockTables:
        """Those of the layers that it is about."""
        if not command.narrow:
            return self.full
        assert self.narrow is not None, "the model has no narrow layers"
        return self.narrow

    def forget_edits(self) -> None:
        """Of the block tables: whoever executes steps has seen them."""
        for tables in self.kinds:
            tables.edited.clear()

    def holds(self, lease: LeaseId) -> bool:
        """The lease has not ended on this side."""
        return bool(self.lease[lease & ROW_MASK] == lease)

    def _start(self, start: Start) -> None:
        row = start.lease & ROW_MASK
        self._clear(row)
        tokens = np.frombuffer(start.tokens, np.int32)
        self.lease[row] = start.lease
        self.known[row] = len(tokens)
        self.computed[row] = start.cached_tokens
        self.limit[row] = start.prompt_tokens + start.max_tokens
        self.tokens[row] = tokens
        self._least[row] = start.prompt_tokens + start.params.min_tokens
        self._set_stop_ids(row, start.stop_ids)
        if start.params.prompt_logprobs is not None and len(tokens) == start.prompt_tokens:  # else it was measured before
            self._measured[row] = (start.prompt_tokens, start.params.prompt_logprobs)
        if start.pooling is not None:
            self._pooling[row] = start.pooling
        self.full.begin(row, start.first, np.frombuffer(start.blocks, np.int32))
        if self.narrow is not None:
            self.narrow.begin(row, start.narrow_first, np.frombuffer(start.narrow, np.int32))
        self._count(row)

    def _set_stop_ids(self, row: int, ids: tuple[int, ...]) -> None:
        width = self._stop_ids.shape[1]
        if len(ids) > width:
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, len(ids) - width)), constant_values=NO_TOKEN)
        self._stop_ids[row] = NO_TOKEN
        self._stop_ids[row, : len(ids)] = ids

    def _grant(self, row: int, grant: Grant) -> None:
        if grant.blocks:
            self.full.append(row, np.array(grant.blocks, np.int32))
        if grant.narrow and self.narrow is not None:
            self.narrow.append(row, np.array(grant.narrow, np.int32))
        self._count(row)

    def _count(self, row: int) -> None:
        """The tokens that its blocks hold, in all layers."""
        blocks = self.full.counts[row] if self.narrow is None else min(self.full.counts[row], self.narrow.counts[row])
        self.granted[row] = blocks * self.block_size

    def _clear(self, row: int) -> None:
        if self.lease[row] != -1:
            self.vacated.append(row)
        self.lease[row] = -1
        self.known[row] = self.computed[row] = self.granted[row] = 0
        for tables in self.kinds:
            tables.clear(row)
        self._measured.pop(row, None)
        self._pooling.pop(row, None)

    # ---- steps

    @property
    def has_work(self) -> bool:
        """There is something to compute, if it need not wait for something else."""
        return bool((np.minimum(self.known, self.granted) > self.computed).any())

    def plan(self, held: Sequence[int] = ()) -> StepPlan:
        """held: rows that must not sample yet; they may compute what comes before their last token."""
        granted = self._usable() if self._measured else self.granted
        if held or self.unready:
            rows, unready = list(held), list(self.unready)
            granted = granted.copy()
            granted[rows] = np.minimum(granted[rows], self.known[rows] - 1)
            granted[unready] = np.minimum(granted[unready], self.computed[unready])
        plan = plan_step(self.known, self.computed, granted, self.lease, self.max_num_batched_tokens)
        return self._as_chunks(plan) if self._pooling else plan

    def _as_chunks(self, plan: StepPlan) -> StepPlan:
        """A prompt of which one token is left is no decode where that token's hidden state is wanted: decodes give tokens."""
        pooled = np.isin(plan.rows[: plan.decodes], list(self._pooling))
        if not pooled.any():
            return plan
        decodes = plan.decodes - int(pooled.sum())
        order = np.concatenate([np.argsort(pooled, kind="stable"), np.arange(plan.decodes, len(plan.rows))])
        return StepPlan(plan.rows[order], plan.counts[order], decodes)

    def _usable(self) -> Ints:
        """Fewer than were granted where prompts are measured: they share `MEASURED_TOKENS` a step, oldest first."""
        granted = self.granted.copy()
        left = MEASURED_TOKENS
        for row in sorted(self._measured, key=lambda row: int(self.lease[row])):
            granted[row] = min(granted[row], self.computed[row] + left)
            left -= max(0, min(int(granted[row]), int(self.known[row])) - int(self.computed[row]))
        return granted

    def launch(self, plan: StepPlan) -> Launched:
        """Accounts for a step that is about to run: its KV counts as written, its sampled tokens as known."""
        rows = plan.rows
        first = self.computed[rows]
        self.computed[rows] += plan.counts
        samples = self.computed[rows] == self.known[rows]
        pooled = self._pool(rows, plan.counts, samples) if self._pooling else ()
        sampled = rows[samples]
        self.known[sampled] += 1
        full = sampled[self.known[sampled] >= self.limit[sampled]]
        self.computed[full] = self.known[full]  # nothing is left to compute: max_tokens is reached
        measured = self._measure(rows, first) if self._measured else ()
        return Launched(plan, self.lease[rows], first, samples, measured, pooled)

    def _measure(self, rows: Ints, first: Ints) -> tuple[Measured, ...]:
        """The parts of prompts measured in a step that has been launched; a prompt's last token predicts no prompt token."""
        parts = []
        for index in np.flatnonzero(np.isin(rows, list(self._measured))).tolist():
            row = int(rows[index])
            prompt, most = self._measured[row]
            end = min(int(self.computed[row]), prompt - 1)
            if end > first[index]:
                parts.append(Measured(index, end - int(first[index]), most))
            if self.computed[row] >= prompt:
                del self._measured[row]
        return tuple(parts)

    def _pool(self, rows: Ints, counts: Ints, samples: npt.NDArray[np.bool_]) -> tuple[PooledPart, ...]:
        """What is wanted of the hidden states of a step that is being launched. Takes those rows out of `samples`."""
        parts = []
        for index in np.flatnonzero(np.isin(rows, list(self._pooling))).tolist():
            pooling, count, ends = self._pooling[int(rows[index])], int(counts[index]), bool(samples[index])
            samples[index] = False
            if pooling == "mean":
                parts.append(PooledPart(index, 0, count, pooling, ends))
            elif ends:
                parts.append(PooledPart(index, count - 1, 1, pooling, ends))
        return tuple(parts)

    def collect(self, step: Launched, tokens: npt.NDArray[np.int64]) -> list[tuple[int, FinishReason]]:
        """Takes a step's sampled tokens [n] (ignored where `samples` is false, NO_TOKEN where sampling failed); ends
        sequences by failure, stop id and length, and those whose prompt was to be pooled and is whole.

        Returns (index in the step, reason) of those that ended. Rows whose lease ended meanwhile are passed over.
        """
        rows = step.plan.rows
        length = step.first + step.plan.counts + 1
        live = step.samples & (self.lease[rows] == step.leases)
        failed = tokens == NO_TOKEN
        stop = (self._stop_ids[rows] == tokens[:, None]).any(axis=1) & (length >= self._least[rows])
        ended = []
        for index in np.flatnonzero(live & (failed | stop | (length >= self.limit[rows]))).tolist():
            reason = FinishReason.STOP if stop[index] else FinishReason.LENGTH
            ended.append((index, FinishReason.FAILED if failed[index] else reason))
            self._clear(int(rows[index]))
        for part in step.pooled:
            if part.ends and self.lease[rows[part.index]] == step.leases[part.index]:
                ended.append((part.index, FinishReason.STOP))
                self._clear(int(rows[part.index]))
        return ended

    def live(self, step: Launched) -> npt.NDArray[np.bool_]:
        """[n] whose lease has not ended since the step was launched."""
        same: npt.NDArray[np.bool_] = self.lease[step.plan.rows] == step.leases
        return same
