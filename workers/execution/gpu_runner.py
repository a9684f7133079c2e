"""Executes steps on a GPU: decodes as one graph over the batch that lives there, prefill chunks beside it.

    update ──▶ decode graph: gather · layers · head · sample ──▶ chunks: layers · head · sample ──▶ tokens to the host
    one copy,   the host launches it and goes on                   eager                             read one step later
    or none

The host never waits here for a step that it has launched, but for rows that follow a grammar (`pending.Following`). Imports torch
and the tensor side of the room.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from scheduler.messages import Start
from workers.attention.base import PagedAttention
from workers.execution.chunks import ChunkInputs
from workers.execution.device_batch import IN_FLIGHT, DeviceBatch
from workers.execution.graphs import DecodeGraphs
from workers.execution.pending import Following
from workers.execution.pinned import PinnedRing
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending, row_of
from workers.model.fused import FusedDecoder
from workers.sampling.constraints import Constraints
from workers.sampling.device import DeviceSampler

Ints = npt.NDArray[np.int64]


class GpuRunner:
    """The `Executor` of a GPU. Until `capture` was called, decodes run eagerly, which is slower and the same otherwise.

    model, attention: bound to one pool, whose last page is the scratch page of `state`. most: decodes in one step.
    """

    def __init__(
        self,
        model: FusedDecoder,
        attention: PagedAttention,
        sampler: DeviceSampler,
        constraints: Constraints,
        state: DeviceBatch,
        most: int,
    ) -> None:
        self.pool = model.pool
        device = self.pool.device
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._constraints = constraints
        self._following = Following(constraints)
        self._state = state
        self._chunk_inputs = ChunkInputs(state, device)
        self._sampled = torch.zeros(2 * most, dtype=torch.int32, device=device)  # of a step, in its order
        self._ring = PinnedRing(device, IN_FLIGHT, 2 * most)
        self._whole: DecodeGraphs | None = None  # decode steps, sampling included
        self._unsampled: DecodeGraphs | None = None  # up to the logits, for steps in which a grammar has a say

    def capture(self, sizes: tuple[int, ...], captured: Callable[[int], None] = lambda _: None) -> None:
        """Captures decode steps of these sizes, with and without sampling. captured: told how many graphs there are."""
        with torch.inference_mode():
            whole, unsampled = DecodeGraphs(sizes), DecodeGraphs(sizes)
            whole.capture(self._decode_and_sample, captured)
            unsampled.capture(self._decode, lambda done: captured(len(sizes) + done))
        self._whole, self._unsampled = whole, unsampled

    # ---- Executor

    def admit(self, start: Start) -> None:
        row, tokens = row_of(start), np.frombuffer(start.tokens, np.int32)
        prompt, output = tokens[: start.prompt_tokens], tokens[start.prompt_tokens :]
        settings = self._sampler.admit(
            row, params=start.params, seed=start.seed, choice=start.choice, stop_ids=start.stop_ids, prompt=prompt,
            output=output,
        )  # fmt: skip
        self._state.admit(row, int(tokens[-1]), settings)
        self._constraints.admit(row, start.params.grammar, output)

    def release(self, row: int) -> None:
        self._sampler.release(row)
        self._constraints.release(row)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.pool.copy(source, target, tokens)

    def close(self) -> None:
        self._constraints.close()

    @torch.inference_mode()
    def execute(self, batch: ResidentBatch, step: Launched) -> Pending:
        decodes, samples = step.plan.decodes, np.flatnonzero(step.samples)
        rows = step.plan.rows[samples]
        constrained = self._constraints.any(rows[:decodes])
        padded = self._whole.fit(decodes) if self._whole is not None and decodes else decodes
        self._state.update(batch, step, padded)
        decoded = self._launch_decodes(padded, sampled=not constrained)
        chunks = self._launch_chunks(batch, step)
        allowed = self._following.allowed(rows)
        if allowed is not None:
            self._sampler.allow(rows[allowed.samples], allowed.bits)
        if constrained:
            self._sample(decoded, self._state.order[:padded], self._state.contexts[:padded], 0)
        logits = decoded[:decodes]
        if chunks is not None:
            prefilled, chunk = chunks
            begun = len(chunk.rows)
            self._sample(prefilled[:begun], chunk.rows, chunk.positions, decodes)
            logits = prefilled[:begun] if not decodes else torch.cat((logits, prefilled[:begun])) if self._sampler.measures(rows) else logits
        raise NotImplementedError
