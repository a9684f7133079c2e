"""From a step's plan to the tensors that the model reads. Vectorised over the batch; one copy to the device.

Imports torch, NumPy, the batch, `step` and what rows with adapters are.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from workers.kernels.lora.weights import Segments
from workers.loop.batch import NO_ADAPTER, Launched, ResidentBatch
from workers.step import StepInput


def build_step(batch: ResidentBatch, step: Launched, last_tokens: Tensor) -> StepInput:
    """Builds the ragged batch of `step`.

    last_tokens: [rows] int64 on the device, each row's newest token. Single-token rows read it there, so that a token just
    sampled never visits the host; chunks take theirs from the prompt.
    """
    device = last_tokens.device
    rows, counts = step.plan.rows, step.plan.counts
    context = step.first + counts
    starts = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(starts[-1]) - starts[owner] + step.first[owner]
    slots = batch.full.slots(rows[owner], positions, batch.block_size)
    width = int(-(-context.max() // batch.block_size))
    tables = batch.full.ids[rows, :width]
    decodes = step.plan.decodes
    spans = zip(rows[decodes:], step.first[decodes:], context[decodes:], strict=True)
    chunks = [batch.tokens[row][start:end] for row, start, end in spans]
    decoded = last_tokens[_tensor(rows[:decodes], device)]
    tokens = torch.cat([decoded, _tensor(np.concatenate(chunks).astype(np.int64), device)]) if chunks else decoded
    made = StepInput(
        tokens=tokens,
        positions=_tensor(positions, device),
        slots=_tensor(slots, device),
        query_starts=_tensor(starts.astype(np.int32), device),
        context_lens=_tensor(context.astype(np.int32), device),
        block_tables=_tensor(tables, device),
        sample_at=_tensor(_wanted(step, starts), device),
        decodes=decodes,
        host_query_lens=counts.astype(np.int32),
        host_context_lens=context.astype(np.int32),
        host_block_tables=tables,
        adapters=_adapters(batch, rows, counts),
    )
    if batch.narrow is None:
        return made
    slots, tables = batch.narrow.slots(rows[owner], positions, batch.block_size), batch.narrow.ids[rows, :width]
    there = replace(made, slots=_tensor(slots, device), block_tables=_tensor(tables, device), host_block_tables=tables)
    return replace(made, narrow=there)


def _adapters(
    batch: ResidentBatch, rows: "np.typing.NDArray[np.int64]", counts: "np.typing.NDArray[np.int64]"
) -> Segments | None:  # fmt: skip
    """Of each token; None: nobody has one."""
    slots = batch.adapter[rows]
    if (slots == NO_ADAPTER).all():
        return None
    return Segments(torch.from_numpy(np.repeat(slots, counts).astype(np.int64)))


def _wanted(step: Launched, starts: "np.typing.NDArray[np.int64]") -> "np.typing.NDArray[np.int64]":
    """Where logits are wanted: of the last token of each sequence that samples, then of the prompts that are measured; behind
    them where hidden states are."""
    sampled = starts[1:][step.samples] - 1
    if not (step.measured or step.pooled):
        return sampled
    measured = [starts[part.index] + np.arange(part.count) for part in step.measured]
    pooled = [starts[part.index] + part.start + np.arange(part.count) for part in step.pooled]
    return np.concatenate([sampled, *measured, *pooled])


def _tensor(array: "np.typing.NDArray[np.int64] | np.typing.NDArray[np.int32]", device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
