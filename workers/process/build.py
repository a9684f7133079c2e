"""Makes one rank ready to step: weights, KV pool, attention, sampler, batch. What a worker does between birth and its loop.

Imports every part of the tensor side; nothing imports it but actors and the in-process cluster.
"""

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from scheduler.protocol.leaders import ExpertLoad
from workers.attention.select import select_backend
from workers.config import ResolvedWorker, WorkerConfig
from workers.execution.cpu.runner import ModelRunner
from workers.execution.expert_counter import ExpertCounter
from workers.execution.spec import RunnerSpec
from workers.loop.adapters import Residency
from workers.loop.batch import ResidentBatch
from workers.loop.rank import Rank
from workers.model.checkpoint.dtype import WIDE_WEIGHTS_FRACTION, Arithmetic, choose, kv_dtype_name
from workers.model.checkpoint.kv_scales import read_scales
from workers.model.checkpoint.weights import Checkpoint
from workers.model.config.architectures import ModelConfig, torch_dtype
from workers.model.decoders.loading import load_decoder
from workers.model.decoders.native import Decoder
from workers.model.lora.slots import AdapterSlots, adapter_slots
from workers.model.lora.store import ReadingStore
from workers.model.reading import DecoderConfig, read_model
from workers.model.sources.files import Need
from workers.model.sources.find import find_checkpoint
from workers.model.sources.progress import DOWNLOADING
from workers.parallel.communicator import Communicator
from workers.sampling.constraints import Constraints
from workers.sampling.grammar import load_tokenizer
from workers.sampling.sampler import Sampler

if TYPE_CHECKING:
    from workers.execution.gpu.runner import GpuRunner

logger = logging.getLogger(__name__)

Phase = Callable[[str, int, int], None]
"""What the build is doing, how much of it is done, and how much there is; 0 of 0 where nobody can say."""

LOADING, MEASURING, PINNING, CAPTURING = "loading weights", "measuring memory", "reserving host memory", "capturing graphs"

MASK_THREADS = 8
"""Threads of a rank for the masks of grammars, at most: half a millisecond of work for a row whose text is free."""

CPU_KV_FRACTION = 0.4
"""Share of a host's available memory that its ranks' KV pools may take together, when nobody says."""


@dataclass(frozen=True, slots=True)
class Built:
    """A rank that can step, and what its mover works on. host: its blocks in host memory, None without such a tier.

    blocks: of the pool, that sequences may be granted. expert_load: as in `Reporter`.
    """

    rank: Rank
    pool: KVPool
    host: KVPool | None
    blocks: int
    expert_load: Callable[[], ExpertLoad | None]

    @property
    def host_blocks(self) -> int:
        """Equal on all ranks of a group."""
        return self.host.blocks if self.host is not None else 0


def build_rank(
    config: WorkerConfig,
    resolved: ResolvedWorker,
    comm: Communicator,
    phase: Phase = lambda *_: None,
    arithmetic: Arithmetic | None = None,
) -> Built:
    """Loads this rank's shard. All ranks of the group call it together.

    arithmetic: what the device computes in; None: it is asked. Errors: CheckpointError, ValueError (memory, attention backend),
    torch's out-of-memory error.
    """
    torch.set_num_threads(resolved.threads)
    device = torch.device(resolved.device)
    folder = find_checkpoint(config, Need.WEIGHTS, partial(phase, DOWNLOADING))
    config = replace(config, model=str(folder), revision=None)
    model_config = read_model(folder, config)
    if comm.rank == 0:
        logger.info("model: %s, %s", model_config.architecture, _whose(config, model_config))
    shape = model_config.shard(comm.rank, comm.size)
    dtype = _choose_dtype(config, model_config, comm, device, arithmetic or Arithmetic.of(device))
    kv_dtype = kv_dtype_name(config.kv_dtype, dtype)
    layout = BlockLayout(config.block_size, shape.layers, shape.kv_heads, shape.head_dim, kv_dtype)
    scales = read_scales(config.model, shape.layers) if layout.scaled else None
    vocabulary = shape.vocab * comm.size  # with the ids that fill it up to a multiple of the ranks
    read = partial(load_tokenizer, Path(config.model), vocabulary, model_config.eos_ids)
    threads = max(resolved.threads, min(MASK_THREADS, (os.cpu_count() or 1) // config.ranks))
    constraints = Constraints(read, vocabulary, threads)
    try:
        make = _gpu_runner if device.type == "cuda" else _cpu_runner
        spec = RunnerSpec(config, resolved, model_config, layout, comm, dtype, constraints, scales)
        runner, blocks, lora = make(spec, phase)
        host = _host_pool(config, layout, comm, device, phase) if config.host_kv_memory else None
    except BaseException:
        constraints.close()
        raise
    if comm.rank == 0:
        scaled = f", scaled {'by 1' if scales is None else 'as the checkpoint says'}" if layout.scaled else ""
        logger.info("KV pool: %d blocks of %d tokens in %s%s, %s bytes a rank", blocks, config.block_size, kv_dtype, scaled,
                    f"{blocks * layout.block_bytes:,}")  # fmt: skip
    batch = ResidentBatch(config.max_num_seqs, config.block_size, config.max_num_batched_tokens, resolved.max_model_len)
    rank = Rank(batch, runner, resolved.depth, constraints)
    if lora is not None:
        rank.adapters = Residency(batch, config.lora_slots, ReadingStore(lora))
        if comm.rank == 0:
            logger.info("LoRA: room for %d adapters of rank %d, %s bytes a rank", config.lora_slots, config.max_lora_rank,
                        f"{lora.nbytes:,}")  # fmt: skip
    counts = runner.expert_counts
    expert_load = (lambda: None) if counts is None else ExpertCounter(counts).take
    return Built(rank, runner.pool, host, blocks, expert_load)


def settle() -> None:
    """For a process that does nothing but step: what was built stays, so the collector need not look at it again.

    A full collection over torch's and transformers' modules takes longer than a hundred of a GPU's steps.
    """
    gc.collect()
    gc.freeze()


def _whose(config: WorkerConfig, model: DecoderConfig) -> str:
    """Whose layers compute, and why, in words."""
    why = "as asked" if config.model_implementation != "auto" else ""
    if isinstance(model, ModelConfig):
        return f"Manta's own layers, {why or 'which there are for this architecture'}"
    return f"transformers' own class with Manta's attention, {why or 'since Manta has no layers of its own for it'}"


def _choose_dtype(
    config: WorkerConfig, model: DecoderConfig, comm: Communicator, device: torch.device, arithmetic: Arithmetic
) -> torch.dtype:
    """The same on all ranks: as told, or what the weakest processor and the smallest memory of the group ask for."""
    if config.dtype != "auto":
        return torch_dtype(config.dtype)
    with Checkpoint(config.model, model.scheme) as checkpoint:
        stored = checkpoint.stored()
    least = partial(_least, comm, device)
    together = replace(arithmetic, bfloat16=bool(least(arithmetic.bfloat16)), float16=bool(least(arithmetic.float16)))
    share = int(_memory("MemTotal", "SC_PHYS_PAGES") * WIDE_WEIGHTS_FRACTION) * comm.size // config.ranks
    room = least(min(share, _available_memory()))
    choice = choose(model.dtype, stored, together, config.max_num_seqs, room)
    if comm.rank == 0:
        logger.info("dtype %s: %s", str(choice.dtype).removeprefix("torch."), choice.why)
    return choice.dtype


def _cpu_runner(spec: RunnerSpec, phase: Phase) -> tuple[ModelRunner, int, AdapterSlots | None]:
    """What executes on a CPU, how many blocks it has, and where its adapters are."""
    config, comm, device, shape = spec.config, spec.comm, spec.device, spec.shape
    model = load_decoder(
        config.model, spec.model, comm, spec.dtype, device, partial(phase, LOADING), spec.resolved.max_model_len,
        spec.resolved.score_tokens,
    )  # fmt: skip
    lora = adapter_slots(config, model)
    phase(MEASURING, 0, 0)
    memory = config.kv_memory
    if memory is None:
        memory = int(_available_memory() * CPU_KV_FRACTION) // config.ranks
    blocks = _agree_on_blocks(comm, _useful_blocks(spec, memory), device)
    pool = KVPool(spec.layout, blocks, device, scales=spec.kv_scales)
    if isinstance(model, Decoder):
        model.attention = select_backend(
            config.attention, pool=pool, heads=shape.heads, forms=model.forms, dtype=spec.dtype
        )
    else:
        model.attend_over(pool, config.attention)
    sampler = Sampler(
        vocab_size=spec.model.vocab_size, local_vocab=shape.vocab, comm=comm, max_num_seqs=config.max_num_seqs, device=device,
        dtype=spec.dtype,
    )  # fmt: skip
    return ModelRunner(model, sampler, spec.constraints, config.max_num_seqs, pool), blocks, lora


def _gpu_runner(spec: RunnerSpec, phase: Phase) -> tuple["GpuRunner", int, AdapterSlots | None]:
    """The same on a GPU. The blocks are for sequences: one more is where padding writes."""
    from workers.execution.gpu.parts import GpuParts  # Triton comes with it

    parts = GpuParts(spec)
    parts.load(partial(phase, LOADING))
    phase(MEASURING, 0, 0)
    config, layout = spec.config, spec.layout
    memory = config.kv_memory if config.kv_memory is not None else parts.measure()
    blocks = _agree_on_blocks(spec.comm, _useful_blocks(spec, memory - layout.block_bytes), spec.device)
    return parts.runner(blocks, partial(phase, CAPTURING)), blocks, parts.lora


def _host_pool(config: WorkerConfig, layout: BlockLayout, comm: Communicator, device: torch.device, phase: Phase) -> KVPool:
    """Blocks in host memory: on a CPU committed as they are first written, for a GPU pinned at once.

    Errors: ValueError if not even one fits, RuntimeError where so much cannot be pinned.
    """
    phase(PINNING, 0, 0)
    if config.host_kv_memory < layout.block_bytes:
        raise ValueError(f"host_kv_memory={config.host_kv_memory:,} holds no block: one takes {layout.block_bytes:,} bytes")
    host_blocks = _agree_on_blocks(comm, layout.blocks_in(config.host_kv_memory), device)
    if comm.rank == 0:
        logger.info("host tier: %d blocks, %s bytes a rank", host_blocks, f"{host_blocks * layout.block_bytes:,}")
    return KVPool(layout, host_blocks, "cpu", pinned=device.type == "cuda")


def _useful_blocks(spec: RunnerSpec, memory: int) -> int:
    """Whole blocks in `memory`, no more than all rows at full length could fill. Errors: ValueError if not even one fits."""
    longest = spec.layout.blocks_for(spec.resolved.max_model_len)
    return min(spec.layout.blocks_in(memory), spec.config.max_num_seqs * longest)


def _agree_on_blocks(comm: Communicator, blocks: int, device: torch.device) -> int:
    """The smallest pool of the group: a block id must be valid on every rank."""
    return _least(comm, device, blocks)


def _least(comm: Communicator, device: torch.device, number: int) -> int:
    """The smallest of what the group's ranks say."""
    return int(comm.all_gather(torch.tensor([number], dtype=torch.int64, device=device)).min())


def _available_memory() -> int:
    """Bytes that the host can give without swapping (Linux; elsewhere the free blocks)."""
    return _memory("MemAvailable", "SC_AVPHYS_PAGES")


def _memory(kind: str, blocks: str) -> int:
    """Bytes of the host. kind: a line of Linux's meminfo; blocks: what else to ask sysconf for."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(blocks)
