"""The inputs of a step's prefill chunks, from the host's batch: one pinned copy to the device.

Imports torch, NumPy, `device_batch` and what attention wants of chunks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.attention.base import Chunks
from workers.execution.device_batch import IN_FLIGHT, DeviceBatch
from workers.execution.pinned import PinnedRing
from workers.loop.batch import Launched, ResidentBatch

Ints = npt.NDArray[np.int64]
ALIGNED = 4  # int32s


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """The chunks of a step: tensors on the device, int32, until the next step is built.

    tokens, positions, slots: [tokens]. wanted: [n] tokens whose logits are wanted: of those that sample, then of prompts that
    are measured. sampled_rows, sampled_positions: [samples] rows of the batch, and the positions of their new tokens.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    wanted: Tensor
    sampled_rows: Tensor
    sampled_positions: Tensor
    attention: Chunks


class ChunkInputs:
    """Builds the chunk part of steps; its device buffer is used anew by each step, in stream order."""

    def __init__(self, state: DeviceBatch, device: torch.device) -> None:
        self._state = state
        self._ring = PinnedRing(device, IN_FLIGHT, 1 << 14)
        self._buffer = torch.zeros(1 << 15, dtype=torch.int32, device=device)

    def build(self, batch: ResidentBatch, step: Launched) -> ChunkStep:
        """The sequences of `step` behind its decodes."""
        decodes = step.plan.decodes
        rows, counts, first = step.plan.rows[decodes:], step.plan.counts[decodes:], step.first[decodes:]
        samples = step.samples[decodes:]
        context = first + counts
        starts = np.concatenate([[0], np.cumsum(counts)])
        owner = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + first[owner]
        page, offset = np.divmod(positions, batch.page_size)
        slots = batch.block_table[rows[owner], page].astype(np.int64) * batch.page_size + offset
        tokens = [batch.tokens[row][begin:end] for row, begin, end in zip(rows, first, context, strict=True)]
        wanted = [starts[1:][samples] - 1]
        wanted += [starts[part.index - decodes] + np.arange(part.count) for part in step.measured]
        parts = [
            np.concatenate(tokens), positions, slots, starts, context, rows, np.concatenate(wanted), rows[samples],
            context[samples],
        ]  # fmt: skip
        sent = self._send(parts)
        width = int(-(-context.max() // batch.page_size))
        return ChunkStep(
            tokens=sent[0],
            positions=sent[1],
            slots=sent[2],
            wanted=sent[6],
            sampled_rows=sent[7],
            sampled_positions=sent[8],
            attention=Chunks(
                query_starts=sent[3],
                context_lens=sent[4],
                block_tables=self._state.tables.index_select(0, sent[5])[:, :width],
                tokens=int(starts[-1]),
                max_query=int(counts.max()),
                max_context=int(context.max()),
            ),
        )

    def _send(self, parts: list[Ints]) -> list[Tensor]:
        """Each part on the device, from an address that is a multiple of 16 bytes: Triton compiles anew for others."""
        sizes = [-(-len(part) // ALIGNED) * ALIGNED for part in parts]
        total = sum(sizes)
        if len(self._buffer) < total:
            self._buffer = torch.zeros(2 * total, dtype=torch.int32, device=self._buffer.device)
        padded = [np.pad(part, (0, size - len(part))) for part, size in zip(parts, sizes, strict=True)]
        self._ring.send(np.concatenate(padded).astype(np.int32), self._buffer)
        sent = self._buffer[:total].split_with_sizes(sizes)
        return [tensor[: len(part)] for tensor, part in zip(sent, parts, strict=True)]
