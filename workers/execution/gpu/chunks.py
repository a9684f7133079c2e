"""The inputs of a step's prefill chunks, from the host's batch: one pinned copy to the device.

Imports torch, NumPy, `device_batch` and what attention wants of chunks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.attention.base import Chunks
from workers.execution.gpu.device_batch import IN_FLIGHT, DeviceBatch
from workers.execution.gpu.pinned import PinnedRing
from workers.loop.batch import NO_ADAPTER, Launched, ResidentBatch

Ints = npt.NDArray[np.int64]
ALIGNED = 4
"""Each part of a step begins at a multiple of so many int32s, 16 bytes: Triton compiles anew for other addresses."""

PADDED_CHUNKS = 32
"""Sequences of a step whose size is padded, so that a graph can have it."""


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """The chunks of a step: tensors on the device, int32, until the next step is built.

    tokens, positions, slots: [tokens]. rows: [chunks] of the batch. wanted: [n] tokens whose logits are wanted: of those that
    sample, then of prompts that are measured; behind them those whose hidden states are. sampled_rows, sampled_positions:
    [samples] rows of the batch, and the positions of their new tokens. adapters: [tokens] slots of their LoRA adapters.
    narrow_slots: [tokens] of narrow layers, where these have their own; else nothing that is read.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    contexts: Tensor
    rows: Tensor
    wanted: Tensor
    sampled_rows: Tensor
    sampled_positions: Tensor
    adapters: Tensor
    narrow_slots: Tensor
    max_query: int
    max_context: int

    def attention(self, tables: Tensor) -> Chunks:
        """What attention wants to know; the block tables are gathered by the device. tables: [rows + 1, blocks]."""
        return Chunks(
            query_starts=self.starts,
            context_lens=self.contexts,
            block_tables=tables.index_select(0, self.rows),
            tokens=len(self.tokens),
            max_query=self.max_query,
            max_context=self.max_context,
        )


class ChunkInputs:
    """Builds the chunk part of steps; its device buffers are used anew by each step, in stream order.

    largest: tokens of the largest step that is ever padded.
    """

    def __init__(self, state: DeviceBatch, device: torch.device, largest: int) -> None:
        self._state = state
        self._ring = PinnedRing(device, IN_FLIGHT, 1 << 14)
        self._buffer = torch.zeros(1 << 15, dtype=torch.int32, device=device)
        self._padded = torch.zeros(sum(_sizes(largest, PADDED_CHUNKS)), dtype=torch.int32, device=device)

    def build(self, batch: ResidentBatch, step: Launched) -> ChunkStep:
        """The sequences of `step` behind its decodes, as many as there are."""
        parts = self._parts(batch, step)
        sizes = [_aligned(len(part)) for part in parts]
        if len(self._buffer) < sum(sizes):
            self._buffer = torch.zeros(2 * sum(sizes), dtype=torch.int32, device=self._buffer.device)
        padded = [np.pad(part, (0, size - len(part))) for part, size in zip(parts, sizes, strict=True)]
        self._ring.send(np.concatenate(padded).astype(np.int32), self._buffer)
        sent = self._buffer[: sum(sizes)].split_with_sizes(sizes)
        query, context = step.plan.counts[step.plan.decodes :], parts[4]
        return _step([tensor[: len(part)] for tensor, part in zip(sent, parts, strict=True)], query.max(), context.max())

    def fill(self, batch: ResidentBatch, step: Launched, tokens: int) -> None:
        """The same, filled up to so many tokens and `PADDED_CHUNKS` sequences, where `padded(tokens)` finds it.

        What fills it up belongs to no sequence, writes to the scratch block, and is sampled for the row of padding.
        """
        self._send_padded(self._parts(batch, step), tokens)

    def padded(self, tokens: int) -> ChunkStep:
        """A step of that size, at addresses that stay."""
        sizes = _sizes(tokens, PADDED_CHUNKS)
        parts = list(self._padded[: sum(sizes)].split_with_sizes(sizes))
        parts[3] = parts[3][: PADDED_CHUNKS + 1]
        return _step(parts, tokens, self._state.longest)

    def clear(self, tokens: int) -> None:
        """A padded step of nothing but padding."""
        nothing = np.zeros(0, np.int64)
        self._send_padded([*[nothing] * 3, np.zeros(1, np.int64), *[nothing] * 7], tokens)

    def _send_padded(self, parts: list[Ints], tokens: int) -> None:
        """parts: as `_parts` gives them."""
        rows, filling = self._state.padding, min(len(parts[0]), tokens - 1)  # a token of padding, if there is any
        state = self._state
        ends = int(parts[3][-1])
        fills = (0, 0, state.scratch_slot, ends, 0, rows, filling, rows, 1, NO_ADAPTER, state.narrow_scratch_slot)
        padded = [
            np.pad(part, (0, size - len(part)), constant_values=fill)
            for part, size, fill in zip(parts, _sizes(tokens, PADDED_CHUNKS), fills, strict=True)
        ]
        self._ring.send(np.concatenate(padded).astype(np.int32), self._padded)

    def _parts(self, batch: ResidentBatch, step: Launched) -> list[Ints]:
        """In the order of `ChunkStep`."""
        decodes = step.plan.decodes
        rows, counts, first = step.plan.rows[decodes:], step.plan.counts[decodes:], step.first[decodes:]
        samples = step.samples[decodes:]
        context = first + counts
        starts = np.concatenate([[0], np.cumsum(counts)])
        owner = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + first[owner]
        slots = batch.full.slots(rows[owner], positions, batch.block_size)
        narrow = slots if batch.narrow is None else batch.narrow.slots(rows[owner], positions, batch.block_size)
        tokens = [batch.tokens[row][begin:end] for row, begin, end in zip(rows, first, context, strict=True)]
        wanted = [starts[1:][samples] - 1]
        wanted += [starts[part.index - decodes] + np.arange(part.count) for part in step.measured]
        wanted += [starts[part.index - decodes] + part.start + np.arange(part.count) for part in step.pooled]
        return [
            np.concatenate(tokens), positions, slots, starts, context, rows, np.concatenate(wanted), rows[samples],
            context[samples], batch.adapter[rows[owner]].astype(np.int64), narrow,
        ]  # fmt: skip


def _step(parts: list[Tensor], max_query: int, max_context: int) -> ChunkStep:
    tokens, positions, slots, starts, contexts, rows, wanted, sampled_rows, sampled_positions, adapters, narrow = parts
    return ChunkStep(
        tokens, positions, slots, starts, contexts, rows, wanted, sampled_rows, sampled_positions, adapters, narrow,
        int(max_query), int(max_context),
    )  # fmt: skip


def _sizes(tokens: int, chunks: int) -> list[int]:
    """int32s of each part of a padded step."""
    return [_aligned(size) for size in (tokens, tokens, tokens, chunks + 1, *[chunks] * 5, tokens, tokens)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
