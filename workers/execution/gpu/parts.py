"""Makes what executes steps on a GPU: loads, measures what the largest steps need, sizes nothing itself, captures.

Imports torch, Triton's kernels and the tensor side of the room.
"""

import gc
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvcache.layout import PoolSizes
from kvcache.pool import KVPool, KVPools
from workers.attention.base import PagedAttention
from workers.attention.select import select_device_backends
from workers.execution.gpu.chunks import PADDED_CHUNKS
from workers.execution.gpu.device_batch import DeviceBatch
from workers.execution.gpu.graphs import chunk_ladder, ladder
from workers.execution.gpu.runner import Captured, GpuRunner, Narrow
from workers.execution.spec import RunnerSpec
from workers.kernels.compiling.ahead import can_compile_ahead, compiling_ahead
from workers.kernels.compiling.pool import CompilePool
from workers.loop.batch import NO_ADAPTER, ResidentBatch
from workers.model.decoders.loading import load_decoder
from workers.model.decoders.native import Decoder
from workers.model.gpu.fused import FusedDecoder, PagedDecoder
from workers.model.lora.slots import AdapterSlots, adapter_slots
from workers.model.sources.progress import Progress
from workers.parallel.in_process import ThreadGroup
from workers.sampling.device import DeviceSampler

if TYPE_CHECKING:
    from workers.model.decoders.transformers.decoder import TransformersDecoder

logger = logging.getLogger(__name__)

MARGIN_BYTES = 256 << 20
"""Left free for what libraries allocate by themselves as they meet new shapes."""


class GpuParts:
    """One rank's model and sampler, from which runners over pools of different sizes are made: one to measure, one to serve.
    To be closed when these are made."""

    def __init__(self, spec: RunnerSpec) -> None:
        config, comm = spec.config, spec.comm
        self._spec = spec
        self._most = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._largest = chunk_ladder(config.max_num_batched_tokens)[-1]
        # Ranks that are threads of one process meet on the host, in the midst of a step: nothing that a graph could hold.
        self._threads = comm.size > 1 and isinstance(comm, ThreadGroup)
        self._graphs = config.cuda_graphs and not self._threads
        # Else interpreted, or of several threads, of which none may wait for another here.
        self._compiles = spec.device.type == "cuda" and not self._threads and can_compile_ahead()
        self._compilers = CompilePool(spec.resolved.host_ranks)
        self._decoder: Decoder | TransformersDecoder | None = None
        self.lora: AdapterSlots | None = None
        """Where its adapters are; None where none are served, and before `load`."""
        self._sampler = DeviceSampler(
            vocab_size=spec.model.vocab_size, comm=comm, max_num_seqs=config.max_num_seqs,
            samples=max(config.max_num_seqs, self._most, PADDED_CHUNKS), device=spec.device, dtype=spec.dtype,
        )  # fmt: skip

    def load(self, progress: Progress) -> None:
        """Errors: CheckpointError, torch's out-of-memory error."""
        spec = self._spec
        if self._compiles:
            self._compilers.expect()  # they come up while weights are read
        self._decoder = load_decoder(
            spec.config.model, spec.model, spec.comm, spec.dtype, spec.device, progress, spec.resolved.max_model_len,
            spec.resolved.score_tokens,
        )  # fmt: skip
        self.lora = adapter_slots(spec.config, self._decoder)

    def measure(self) -> int:
        """Bytes that the pool may take: the share of the GPU that is ours, less what weights, the largest steps and the
        graphs take, which are run and captured here."""
        blocks = self._spec.layout.blocks_for(self._spec.config.max_num_batched_tokens)
        probe = sum((blocks + 1) * layout.block_bytes for layout in self._spec.layouts)
        runner = self._make(PoolSizes(blocks, blocks))
        self._compile(runner)
        torch.cuda.reset_peak_memory_stats()
        self._run_largest_step(runner)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - probe
        graphs = self._measure_graphs(runner) if self._graphs else 0
        del runner
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        return int(total * self._spec.config.gpu_memory_fraction) - others - peak - graphs - MARGIN_BYTES

    def runner(self, sizes: PoolSizes, captured: Captured) -> GpuRunner:
        """The one that serves, over pools of so many blocks and the scratch block of each."""
        runner = self._make(sizes)
        self._compile(runner)
        if self._graphs:
            runner.capture(ladder(self._most), chunk_ladder(self._largest), captured)
        return runner

    def close(self) -> None:
        """Ends the processes that compile kernels."""
        self._compilers.close()

    def _compile(self, runner: GpuRunner) -> None:
        """Whatever steps of all sizes launch. A second time it costs nothing."""
        if not self._compiles:
            return
        with compiling_ahead(self._compilers), runner.representatives():
            for size in ladder(self._most):
                runner.run_padding(size)
            for size in chunk_ladder(self._largest):
                runner.run_padded_prefill(size)
            for tokens in (2, 16, 100):
                self._run_prefill(runner, min(tokens, self._spec.config.max_num_batched_tokens))
        torch.cuda.synchronize()

    def _make(self, sizes: PoolSizes) -> GpuRunner:
        config, kinds = self._spec.config, self._spec.kinds
        pools = self._spec.pools(sizes, spare=1)
        pool, narrow = pools[0], None
        attention, small = self._attention(pool, range(self._spec.layout.layers) if kinds is None else kinds.layers(False))
        if kinds is not None:
            narrow = Narrow(kinds, pools[1], *self._attention(pools[1], kinds.layers(True)))
        state = DeviceBatch(
            max_num_seqs=config.max_num_seqs,
            blocks=self._spec.layout.blocks_for(self._spec.resolved.max_model_len),
            block_size=config.block_size,
            most=self._most,
            scratch_block=sizes.blocks,
            device=self._spec.device,
            prefixes=attention.prefixes,
            narrow_scratch=None if narrow is None else sizes.narrow,
        )
        model = self._over(pool if narrow is None else KVPools(pool, narrow.pool, narrow.kinds), state.scratch_slot)
        return GpuRunner(
            model, attention, small, self._sampler, self._spec.constraints, state, self._most, self._largest, pool,
            config.lora_slots, self._spec.comm.check, narrow,
        )  # fmt: skip

    def _attention(self, pool: KVPool, layers: Sequence[int]) -> tuple[PagedAttention, PagedAttention]:
        """As of `select_device_backends`, for layers whose blocks the pool has."""
        assert self._decoder is not None, "made before it is loaded"
        forms = [self._decoder.forms[layer] for layer in layers]
        shapes = None if isinstance(self._decoder, Decoder) else [self._decoder.heads[layer].even for layer in layers]
        return select_device_backends(
            self._spec.config.attention, pool=pool, heads=self._spec.shape.heads, most=self._most, forms=forms, shapes=shapes,
            dtype=self._spec.dtype,
        )  # fmt: skip

    def _over(self, pool: KVPool | KVPools, scratch_slot: int) -> PagedDecoder:
        if isinstance(self._decoder, Decoder):
            return FusedDecoder(self._decoder, pool, scratch_slot)
        from workers.model.gpu.paged import PagedTransformers

        assert self._decoder is not None, "made before it is loaded"
        return PagedTransformers(self._decoder, pool)

    def _run_largest_step(self, runner: GpuRunner) -> None:
        """A prefill of as many tokens as a step may have, also with adapters, then `most` decodes in the scratch block."""
        for slot in (NO_ADAPTER, 0)[: 2 if self._spec.config.lora_slots else 1]:
            self._run_prefill(runner, self._spec.config.max_num_batched_tokens, slot)
        runner.run_padding(self._most)

    def _run_prefill(self, runner: GpuRunner, tokens: int, adapter: int = NO_ADAPTER) -> None:
        """Prompts of so many tokens together, in blocks which nobody has been granted yet: what they hold does not matter, so
        where there are few, several prompts write to one. adapter: the slot of theirs."""
        config = self._spec.config
        max_model_len = self._spec.resolved.max_model_len
        narrow = runner.narrow
        batch = ResidentBatch(
            config.max_num_seqs, config.block_size, config.max_num_batched_tokens, max_model_len, narrow=narrow is not None
        )
        left, block = max(2, tokens), 0
        for row in range(config.max_num_seqs):
            length = min(left, max(2, max_model_len - 1))
            if length < 2:
                break  # a single token were a decode
            blocks = self._spec.layout.blocks_for(length)
            batch.full.ids[row, :blocks] = (block + np.arange(blocks)) % (runner.pool.blocks - 1)
            if batch.narrow is not None and narrow is not None:
                batch.narrow.ids[row, :blocks] = (block + np.arange(blocks)) % (narrow.blocks - 1)
            batch.known[row], batch.granted[row], batch.lease[row] = length, length, row
            batch.tokens[row], batch.adapter[row] = np.zeros(length, np.int32), adapter
            left, block = left - length, block + blocks
        runner.execute(batch, batch.launch(batch.plan())).wait()

    def _measure_graphs(self, runner: GpuRunner) -> int:
        """Bytes that all graphs will take, by capturing the two largest of each kind."""
        sizes, tokens = ladder(self._most), chunk_ladder(self._largest)
        before = _free()
        runner.capture(sizes[-1:], tokens[-1:])
        one = before - _free()
        runner.capture(sizes[-2:], tokens[-2:])
        return one + max(0, before - _free() - one) * max(len(sizes), len(tokens))


def _free() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


