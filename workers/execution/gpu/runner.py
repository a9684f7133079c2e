"""Executes steps on a GPU: decodes as one graph over the batch that lives there, prefill chunks beside it.

    update ──▶ decode graph: gather · layers · head · sample ──▶ chunks: layers · head · sample ──▶ tokens to the host
    one copy,   the host launches it and goes on                   a graph as well where they are    read one step later
    or none                                                        few, launch by launch otherwise

The host never waits here for a step that it has launched, but for rows that follow a grammar (`pending.Following`).
Imports torch and the tensor side of the room.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcache.layout import LayerKinds
from kvcache.pool import KVPool
from scheduler.protocol.leaders import Start
from workers.attention.base import PagedAttention
from workers.execution.gpu.attend import ChunkAttend, DecodeAttend, KindsAttend
from workers.execution.gpu.chunks import PADDED_CHUNKS, ChunkInputs, ChunkStep
from workers.execution.gpu.device_batch import IN_FLIGHT, DeviceBatch
from workers.execution.gpu.graphs import SMALL_STEP, StepGraphs
from workers.execution.gpu.pinned import PinnedRing
from workers.execution.pending import Arrival, DeviceTokens, Following, measure_prompts
from workers.execution.pooling import PooledPrompt, Pooler
from workers.kernels.attention.prefixes import SharedPrefixes
from workers.kernels.batch import tell
from workers.loop.batch import NO_ADAPTER, Launched, ResidentBatch
from workers.loop.rank import Pending, row_of
from workers.model.gpu.adapters import DeviceRows
from workers.model.gpu.fused import Attend, FusedDecoder, PagedDecoder, Slots
from workers.sampling.constraints import Constraints
from workers.sampling.device import DeviceSampler
from workers.sampling.logprobs import PromptPart

Ints = npt.NDArray[np.int64]
Captured = Callable[[int, int], None]
"""Told how many graphs there are, and will be."""


@dataclass(frozen=True, slots=True)
class StepPart:
    """The decodes of a launched step, or its chunks: logits [samples or more, vocab], and the tokens drawn from them.

    rows, positions, out: [samples or more] int32: rows of the batch, positions of the new tokens, the tokens themselves.
    pooled: [positions, hidden], the hidden states that `step.pooled` wants; None in a step without.
    """

    logits: Tensor
    samples: int
    rows: Tensor
    positions: Tensor
    out: Tensor
    sampled: bool
    pooled: Tensor | None = None

    def drawn(self) -> tuple[Tensor, Tensor]:
        return self.logits[: self.samples], self.out[: self.samples].long()


class Graphs(NamedTuple):
    """whole: decodes, sampling included. unsampled: up to the logits, for steps in which a grammar has a say. prefills: chunks,
    sampling included."""

    whole: StepGraphs
    unsampled: StepGraphs
    prefills: StepGraphs


class Narrow(NamedTuple):
    """What narrow layers beside others have of their own. kinds: which they are. attention, small: as of `GpuRunner`, over
    `pool`."""

    kinds: LayerKinds
    pool: KVPool
    attention: PagedAttention
    small: PagedAttention


@dataclass(frozen=True, slots=True)
class _Checked:
    """An `Arrival` that raises what kept the step from ending as it should. check: raises it."""

    arrival: Arrival
    check: Callable[[], None]

    def query(self) -> bool:
        return self.arrival.query()

    def synchronize(self) -> None:
        self.arrival.synchronize()
        self.check()


class GpuRunner:
    """The `Executor` of a GPU. Until `capture` was called decodes are launched one by one: slower, and the same otherwise.

    model, attention: bound to one pool, whose last block is the scratch block of `state`. small: what attends in steps of few
    prefill tokens, which are captured, as are larger ones where `attention` lets them. most: decodes in one step. largest:
    prefill tokens of a step that may be captured. lora_slots: of adapters; a step in which no row has one is as without. pool:
    of all layers, or of those that see all where there are `narrow` ones beside them. check: called when a step has ended,
    before anybody reads its tokens: raises if they may be wrong, which the device does not tell.
    """

    def __init__(
        self,
        model: PagedDecoder,
        attention: PagedAttention,
        small: PagedAttention,
        sampler: DeviceSampler,
        constraints: Constraints,
        state: DeviceBatch,
        most: int,
        largest: int,
        pool: KVPool,
        lora_slots: int = 0,
        check: Callable[[], None] = lambda: None,
        narrow: Narrow | None = None,
    ) -> None:
        self.pool = pool
        self.narrow = narrow.pool if narrow is not None else None
        self._narrow = narrow
        device = self.pool.device
        self._model = model
        self._attention = attention
        self._small = small
        self._sampler = sampler
        self._constraints = constraints
        self._lora_slots = lora_slots
        self._pools = model if isinstance(model, FusedDecoder) else None
        self._check = check
        self.expert_counts = self._pools.expert_counts if self._pools is not None else None
        self._pooler = Pooler(self._pools.classifier if self._pools is not None else None)
        self._following = Following(constraints)
        self._state = state
        self._chunk_inputs = ChunkInputs(state, device, largest)
        rows = state.padding
        self._decoded = torch.zeros(most, dtype=torch.int32, device=device)  # tokens of a step's decodes
        self._begun = torch.zeros(max(rows, PADDED_CHUNKS), dtype=torch.int32, device=device)  # the first ones of its chunks
        self._ring = PinnedRing(device, IN_FLIGHT, most + rows)
        self._whole: StepGraphs | None = None  # as in `Graphs`
        self._unsampled: StepGraphs | None = None
        self._prefills: StepGraphs | None = None
        self._adapted: Graphs | None = None  # of steps with adapters

    def capture(self, decodes: Sequence[int], tokens: Sequence[int], captured: Captured = lambda *_: None) -> None:
        """Captures steps of so many decodes, with and without sampling, and chunks of so many tokens; all of it once more with
        adapters, where there may be any."""
        attentions = [self._attention] if self._narrow is None else [self._attention, self._narrow.attention]
        tokens = [size for size in tokens if size <= SMALL_STEP or all(attention.bounds for attention in attentions)]
        each, kinds = 2 * len(decodes) + len(tokens), 2 if self._lora_slots else 1
        self._whole, self._unsampled, self._prefills = self._capture(
            decodes, tokens, lambda done: captured(done, kinds * each), adapted=False
        )
        if self._lora_slots:
            self._adapted = self._capture(decodes, tokens, lambda done: captured(each + done, kinds * each), adapted=True)

    @torch.inference_mode()
    def _capture(
        self, decodes: Sequence[int], tokens: Sequence[int], captured: Callable[[int], None], *, adapted: bool
    ) -> Graphs:  # fmt: skip
        graphs = Graphs(StepGraphs(decodes), StepGraphs(decodes), StepGraphs(tokens))
        warming = self.representatives
        graphs.whole.capture(partial(self._decode_and_sample, adapted=adapted), captured, warming=warming)
        graphs.unsampled.capture(
            partial(self._decode, adapted=adapted), lambda done: captured(len(decodes) + done), warming=warming
        )
        graphs.prefills.capture(
            partial(self._prefill_padded, adapted=adapted), lambda done: captured(2 * len(decodes) + done),
            self._chunk_inputs.clear, warming,
        )  # fmt: skip
        return graphs

    def representatives(self) -> AbstractContextManager[None]:
        """Inside, what is run here runs one layer of each kind, where the model can do so: for what shall be launched once."""
        return self._pools.representatives() if self._pools is not None else nullcontext()

    @torch.inference_mode()
    def run_padding(self, size: int) -> None:
        """Decode steps of so many padding rows, launch by launch: before the first sequence, so that they are known to work."""
        for adapted in (False, True)[: 2 if self._lora_slots else 1]:
            self._decode_and_sample(size, adapted)
        tell(self._decoded[:size], self._ring.take(size))
        self._ring.used()

    @torch.inference_mode()
    def run_padded_prefill(self, tokens: int) -> None:
        """The same for steps of so many prefill tokens."""
        self._chunk_inputs.clear(tokens)
        for adapted in (False, True)[: 2 if self._lora_slots else 1]:
            self._prefill_padded(tokens, adapted)

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
        self._pooler.release(row)

    def copy(self, source: int, target: int, tokens: int, *, narrow: bool = False) -> None:
        pool = self.narrow if narrow else self.pool
        assert pool is not None, "the model has no narrow layers"
        pool.copy(source, target, tokens)

    def close(self) -> None:
        self._constraints.close()

    @torch.inference_mode()
    def execute(self, batch: ResidentBatch, step: Launched) -> Pending:
        decodes, samples = step.plan.decodes, np.flatnonzero(step.samples)
        rows = step.plan.rows[samples]
        padded = (self._whole.fit(decodes) if self._whole is not None and decodes else None) or decodes
        self._state.update(batch, step, padded)
        parts: list[StepPart] = []
        if decodes:
            adapted = self._adapts(batch, step.plan.rows[:decodes])
            parts.append(self._launch_decodes(decodes, padded, self._constraints.any(rows[:decodes]), adapted))
        if decodes < len(step.plan.rows):
            parts.append(self._launch_chunks(batch, step, self._constraints.any(rows[decodes:])))
        allowed = self._following.allowed(rows)  # after the launches: the device computes while this waits
        if allowed is not None:
            self._sampler.constrain(rows[allowed.samples], allowed.bits)
        for part in parts:
            if not part.sampled and part.samples:
                self._sample(part.logits[: part.samples], part.rows, part.positions, part.out)
        last = parts[-1]  # the chunks, where prompts are measured or pooled
        measured = measure_prompts(self._sampler.measure_prompt, batch, step, last.logits[last.samples :])
        pooled = [] if last.pooled is None else self._pooler.pool(step, last.pooled)
        return self._following.pending(self._to_host(step, samples, parts, [*measured, *pooled]), samples, allowed)

    # ---- decodes

    def _adapts(self, batch: ResidentBatch, rows: Ints) -> bool:
        """One of the rows has an adapter."""
        return bool(self._lora_slots) and bool((batch.adapter[rows] != NO_ADAPTER).any())

    def _launch_decodes(self, decodes: int, padded: int, constrained: bool, adapted: bool) -> StepPart:
        """constrained: a grammar has a say, so they are not sampled yet. adapted: some have adapters."""
        graphs = self._unsampled if constrained else self._whole
        if adapted:
            graphs = self._adapted and (self._adapted.unsampled if constrained else self._adapted.whole)
        launch = self._decode if constrained else self._decode_and_sample
        logits = graphs.replay(padded) if graphs is not None else launch(padded, adapted)
        return StepPart(logits, decodes, self._state.order, self._state.contexts, self._decoded, not constrained)

    def _decode(self, size: int, adapted: bool = False) -> Tensor:
        """Device tensors alone, at addresses that stay: may be captured."""
        state = self._state
        state.gather(size)
        full = self._attend_decodes(self._attention, size, state.step_tables, state.prefixes)
        attend: Attend = full
        slots: Slots = state.slots[:size]
        if self._narrow is not None and state.narrow is not None:
            beside = self._attend_decodes(self._narrow.attention, size, state.narrow.step_tables, None)
            attend = KindsAttend([full, beside], self._narrow.kinds)
            slots = state.slots[:size], state.narrow.slots[:size]
        adapters = DeviceRows(state.adapters.index_select(0, state.order[:size]), self._lora_slots) if adapted else None
        return self._model.logits(
            state.tokens[:size], state.positions[:size], slots, attend, adapters=adapters
        )

    def _attend_decodes(
        self, attention: PagedAttention, size: int, step_tables: Tensor, shared: SharedPrefixes | None
    ) -> DecodeAttend:  # fmt: skip
        """Of one kind of layer."""
        contexts, tables = self._state.contexts[:size], step_tables[:size]
        plan = attention.plan_decode(contexts, size, tables.shape[1], shared)
        return DecodeAttend(attention, tables, contexts, plan, attention.turns(size))

    def _decode_and_sample(self, size: int, adapted: bool = False) -> Tensor:
        logits = self._decode(size, adapted)
        self._sample(logits, self._state.order, self._state.contexts, self._decoded)
        return logits

    def _sample(self, logits: Tensor, rows: Tensor, positions: Tensor, out: Tensor) -> None:
        """A token for each of logits [n, vocab], into the first n of `out`. positions: that the new tokens will have."""
        n = len(logits)
        self._sampler.sample(logits, rows[:n], positions[:n], self._state.settings, out[:n], self._state.last_token)

    # ---- prefill

    def _launch_chunks(self, batch: ResidentBatch, step: Launched, constrained: bool) -> StepPart:
        """By a graph where one holds them, else launch by launch."""
        decodes = step.plan.decodes
        samples, adapted = int(step.samples[decodes:].sum()), self._adapts(batch, step.plan.rows[decodes:])
        plain = not (constrained or step.measured or step.pooled) and len(step.plan.rows) - decodes <= PADDED_CHUNKS
        prefills = self._prefills if not adapted else self._adapted and self._adapted.prefills
        if plain and prefills is not None:
            size = prefills.fit(int(step.plan.counts[decodes:].sum()))
            if size is not None:
                self._chunk_inputs.fill(batch, step, size)
                logits = prefills.replay(size)
                chunks = self._chunk_inputs.padded(size)
                return StepPart(logits, samples, chunks.sampled_rows, chunks.sampled_positions, self._begun, True)
        chunks = self._chunk_inputs.build(batch, step)
        if step.pooled:
            logits, pooled = self._pool(chunks, step.pooled_tokens, adapted)
        else:
            logits, pooled = self._prefill(chunks, adapted), None
        return StepPart(logits, samples, chunks.sampled_rows, chunks.sampled_positions, self._begun, False, pooled)

    def _prefill_padded(self, tokens: int, adapted: bool = False) -> Tensor:
        """A padded step of chunks, sampled; device tensors alone, at addresses that stay: may be captured."""
        chunks = self._chunk_inputs.padded(tokens)
        logits = self._prefill(chunks, adapted, small=tokens <= SMALL_STEP)
        self._sample(logits, chunks.sampled_rows, chunks.sampled_positions, self._begun)
        return logits

    def _prefill(self, chunks: ChunkStep, adapted: bool, *, small: bool = False) -> Tensor:
        """Logits where they are wanted."""
        (attend, slots), adapters = self._attend(chunks, small), self._adapters(chunks, adapted)
        return self._model.logits(chunks.tokens, chunks.positions, slots, attend, chunks.wanted, adapters)

    def _adapters(self, chunks: ChunkStep, adapted: bool) -> DeviceRows | None:
        return DeviceRows(chunks.adapters, self._lora_slots) if adapted else None

    def _pool(self, chunks: ChunkStep, count: int, adapted: bool) -> tuple[Tensor, Tensor]:
        """Logits where they are wanted, and the hidden states of the last `count` of `chunks.wanted`."""
        assert self._pools is not None, "a checkpoint of which nothing is pooled is refused at the door"
        (attend, slots), adapters = self._attend(chunks), self._adapters(chunks, adapted)
        hidden = self._pools.hidden(chunks.tokens, chunks.positions, slots, attend, chunks.wanted, adapters)
        others, pooled = hidden.split_with_sizes((len(hidden) - count, count))
        return self._pools.head(others), pooled

    def _attend(self, chunks: ChunkStep, small: bool = False) -> tuple[Attend, Slots]:
        """And where their KV goes."""
        attention, narrow, beside = self._small if small else self._attention, self._narrow, self._state.narrow
        attend = ChunkAttend(attention, attention.plan_chunks(chunks.attention(self._state.tables)))
        if narrow is None or beside is None:
            return attend, chunks.slots
        attention = narrow.small if small else narrow.attention
        other = ChunkAttend(attention, attention.plan_chunks(chunks.attention(beside.tables)))
        return KindsAttend([attend, other], narrow.kinds), (chunks.slots, chunks.narrow_slots)

    # ---- back to the host

    def _to_host(
        self, step: Launched, samples: Ints, parts: Sequence[StepPart], prompts: list[PromptPart | PooledPrompt]
    ) -> DeviceTokens:
        rows = step.plan.rows[samples]
        host, at = self._ring.take(len(samples)), 0
        for part in parts:
            if part.samples:
                tell(part.out[: part.samples], host[at:])
                at += part.samples
        logprobs = None
        if self._sampler.measures(rows):
            logprobs = self._sampler.measure([part.drawn() for part in parts], rows)
        return DeviceTokens(step, samples, host, logprobs, prompts, _Checked(self._ring.used(), self._check))
