"""Executes steps on a GPU: decodes as one graph over the batch that lives there, prefill chunks beside it.

    update ──▶ decode graph: gather · layers · head · sample ──▶ chunks: layers · head · sample ──▶ tokens to the host
    one copy,   the host launches it and goes on                   eager                             read one step later
    or none

The host never waits here for a step that it has launched, but for rows that follow a grammar (`pending.Following`).
Imports torch and the tensor side of the room.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcache.pool import KVPool
from scheduler.messages import Start
from workers.attention.base import PagedAttention
from workers.execution.chunks import ChunkInputs, ChunkStep
from workers.execution.device_batch import IN_FLIGHT, DeviceBatch
from workers.execution.graphs import DecodeGraphs
from workers.execution.pending import DeviceTokens, Following
from workers.execution.pinned import PinnedRing
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending, row_of
from workers.model.fused import FusedDecoder
from workers.sampling.constraints import Constraints
from workers.sampling.device import DeviceSampler
from workers.sampling.logprobs import PromptPart

Ints = npt.NDArray[np.int64]
Captured = Callable[[int, int], None]
"""Told how many graphs there are, and will be."""


class GpuRunner:
    """The `Executor` of a GPU. Until `capture` was called decodes are launched one by one: slower, and the same otherwise.

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
        self.pool: KVPool = model.pool
        device = self.pool.device
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._constraints = constraints
        self._following = Following(constraints)
        self._state = state
        self._chunk_inputs = ChunkInputs(state, device)
        rows = state.padding
        self._decoded = torch.zeros(most, dtype=torch.int32, device=device)  # tokens of a step's decodes
        self._begun = torch.zeros(rows, dtype=torch.int32, device=device)  # the first ones of its chunks
        self._ring = PinnedRing(device, IN_FLIGHT, most + rows)
        self._whole: DecodeGraphs | None = None  # decode steps, sampling included
        self._unsampled: DecodeGraphs | None = None  # up to the logits, for steps in which a grammar has a say

    def capture(self, sizes: tuple[int, ...], captured: Captured = lambda *_: None) -> None:
        """Captures decode steps of these sizes, with and without sampling."""
        with torch.inference_mode():
            whole, unsampled = DecodeGraphs(sizes), DecodeGraphs(sizes)
            whole.capture(self._decode_and_sample, lambda done: captured(done, 2 * len(sizes)))
            unsampled.capture(self._decode, lambda done: captured(len(sizes) + done, 2 * len(sizes)))
        self._whole, self._unsampled = whole, unsampled

    @torch.inference_mode()
    def run_padding(self, size: int) -> None:
        """A decode step of so many padding rows, launch by launch: before the first sequence, so that it is known to work."""
        self._decode_and_sample(size)

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
        logits = []
        if decodes:
            logits.append(self._launch_decodes(padded, constrained)[:decodes])
        chunks = self._chunk_inputs.build(batch, step) if decodes < len(step.plan.rows) else None
        prefilled = self._chunks(chunks) if chunks is not None else None
        allowed = self._following.allowed(rows)  # after the launches: the device computes while this waits
        if allowed is not None:
            self._sampler.constrain(rows[allowed.samples], allowed.bits)
        if constrained:
            self._sample(logits[0], self._state.order, self._state.contexts, self._decoded)
        if chunks is not None and prefilled is not None and len(chunks.sampled_rows):
            logits.append(prefilled[: len(chunks.sampled_rows)])
            self._sample(logits[-1], chunks.sampled_rows, chunks.sampled_positions, self._begun)
        measured = self._measure(batch, step, prefilled[len(rows) - decodes :]) if prefilled is not None else []
        tokens = self._to_host(step, samples, logits, measured)
        return self._following.pending(tokens, samples, allowed)

    # ---- decodes

    def _launch_decodes(self, padded: int, constrained: bool) -> Tensor:
        """Their logits [padded, vocab]; sampled already, unless a grammar has a say."""
        graphs = self._unsampled if constrained else self._whole
        if graphs is not None:
            return graphs.replay(padded)
        return self._decode(padded) if constrained else self._decode_and_sample(padded)

    def _decode(self, size: int) -> Tensor:
        """Device tensors alone, at addresses that stay: may be captured."""
        state = self._state
        state.gather(size)
        contexts, tables = state.contexts[:size], state.step_tables[:size]
        plan = self._attention.plan_decode(contexts, size, tables.shape[1])

        def attend(layer: int, query: Tensor) -> Tensor:
            return self._attention.decode(layer, query, tables, contexts, plan)

        return self._model.logits(state.tokens[:size], state.positions[:size], state.slots[:size], attend)

    def _decode_and_sample(self, size: int) -> Tensor:
        logits = self._decode(size)
        self._sample(logits, self._state.order, self._state.contexts, self._decoded)
        return logits

    def _sample(self, logits: Tensor, rows: Tensor, positions: Tensor, out: Tensor) -> None:
        """A token for each of logits [n, vocab], into the first n of `out`. positions: that the new tokens will have."""
        n = len(logits)
        self._sampler.sample(logits, rows[:n], positions[:n], self._state.settings, out[:n], self._state.last_token)

    # ---- prefill

    def _chunks(self, chunks: ChunkStep) -> Tensor:
        """Logits where they are wanted: of those that sample, then of prompts that are measured."""
        plan = self._attention.plan_chunks(chunks.attention)

        def attend(layer: int, query: Tensor) -> Tensor:
            return self._attention.chunks(layer, query, plan)

        return self._model.logits(chunks.tokens, chunks.positions, chunks.slots, attend, chunks.wanted)

    def _measure(self, batch: ResidentBatch, step: Launched, logits: Tensor) -> list[PromptPart]:
        """logits: of all measured positions, one part after another."""
        parts = []
        for part in step.measured:
            first = int(step.first[part.index]) + 1
            tokens = batch.tokens[step.plan.rows[part.index]][first : first + part.count]
            numbers = self._sampler.measure_prompt(logits[: part.count], tokens, part.most)
            parts.append(PromptPart(part.index, first, part.most, numbers))
            logits = logits[part.count :]
        return parts

    # ---- back to the host

    def _to_host(
        self, step: Launched, samples: Ints, logits: list[Tensor], measured: list[PromptPart]
    ) -> DeviceTokens:
        rows, decodes = step.plan.rows[samples], step.plan.decodes
        host = self._ring.take(len(samples))
        sampled = [tokens[:n] for tokens, n in ((self._decoded, decodes), (self._begun, len(samples) - decodes)) if n]
        at = 0
        for part in sampled:
            host[at : at + len(part)].copy_(part, non_blocking=True)
            at += len(part)
        logprobs = None
        if self._sampler.measures(rows):
            logprobs = self._sampler.measure(torch.cat(logits), torch.cat(sampled).long(), rows)
        return DeviceTokens(step, samples, host, logprobs, measured, self._ring.used())
