"""Makes one rank ready to step: weights, KV pool, attention, sampler, batch. What a worker does between birth and its loop.

Imports every part of the tensor side; nothing imports it but actors and the in-process cluster.
"""

import contextlib
import gc
import logging
import os
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvcache.layout import BlockLayout, PoolSizes
from kvcache.pool import KVPool
from scheduler.protocol.leaders import ExpertLoad
from workers.attention.base import AttentionBackend
from workers.attention.kinds import KindsAttention
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
    """A rank that can step, and what its mover works on. host: its blocks in host memory, None without such a tier. narrow: the
    same two of narrow layers, if they have their own.

    sizes: of the pools, that sequences may be granted. expert_load: as in `Reporter`.
    """

    rank: Rank
    pool: KVPool
    host: KVPool | None
    sizes: PoolSizes
    expert_load: Callable[[], ExpertLoad | None]
    narrow: tuple[KVPool, KVPool | None] | None = None

    @property
    def host_sizes(self) -> PoolSizes:
        """Equal on all ranks of a group."""
        beside = self.narrow[1] if self.narrow is not None else None
        return PoolSizes(*(pool.blocks if pool is not None else 0 for pool in (self.host, beside)))


_one_by_one = threading.Lock()
"""Groups of one process: while one captures graphs none may wait for the whole device, as each does when it is built; and what
memory is left each is to see after the other. Ranks of one group, which meet while they are built, capture none in a process
with others."""


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
    dtype = _choose_dtype(config, resolved, model_config, comm, device, arithmetic or Arithmetic.of(device))
    kv_dtype = kv_dtype_name(config.kv_dtype, dtype)
    layout = BlockLayout(config.block_size, shape.layers, shape.kv_heads, shape.head_dim, kv_dtype)
    scales = read_scales(config.model, shape.layers) if layout.scaled else None
    vocabulary = shape.vocab * comm.size  # with the ids that fill it up to a multiple of the ranks
    read = partial(load_tokenizer, Path(config.model), vocabulary, model_config.eos_ids)
    threads = max(resolved.threads, min(MASK_THREADS, (os.cpu_count() or 1) // resolved.host_ranks))
    constraints = Constraints(read, vocabulary, threads)
    try:
        spec = RunnerSpec(config, resolved, model_config, layout, comm, dtype, constraints, scales)
        make = _gpu_runner if device.type == "cuda" else _cpu_runner
        with _one_by_one if device.type == "cuda" and comm.size == 1 else contextlib.nullcontext():
            runner, sizes, lora = make(spec, phase)
        hosts = _host_pools(spec, sizes, phase) if config.host_kv_memory else []
    except BaseException:
        constraints.close()
        raise
    if comm.rank == 0:
        scaled = f", scaled {'by 1' if scales is None else 'as the checkpoint says'}" if layout.scaled else ""
        for kind, each, blocks in zip(("", " of layers that see a window"), spec.layouts, sizes, strict=False):
            logger.info("KV pool: %d blocks%s of %d tokens in %s%s, %s bytes a rank", blocks, kind, config.block_size, kv_dtype,
                        scaled, f"{blocks * each.block_bytes:,}")  # fmt: skip
    batch = ResidentBatch(
        config.max_num_seqs, config.block_size, config.max_num_batched_tokens, resolved.max_model_len,
        narrow=runner.narrow is not None,
    )  # fmt: skip
    rank = Rank(batch, runner, resolved.depth, constraints)
    if lora is not None:
        rank.adapters = Residency(batch, config.lora_slots, ReadingStore(lora))
        if comm.rank == 0:
            logger.info("LoRA: room for %d adapters of rank %d, %s bytes a rank", *config.lora_room[:2], f"{lora.nbytes:,}")
    counts = runner.expert_counts
    expert_load = (lambda: None) if counts is None else ExpertCounter(counts).take
    narrow = None if runner.narrow is None else (runner.narrow, hosts[1] if hosts else None)
    return Built(rank, runner.pool, hosts[0] if hosts else None, sizes, expert_load, narrow)


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
    config: WorkerConfig, resolved: ResolvedWorker, model: DecoderConfig, comm: Communicator, device: torch.device,
    arithmetic: Arithmetic,
) -> torch.dtype:  # fmt: skip
    """The same on all ranks: as told, or what the weakest processor and the smallest memory of the group ask for."""
    if config.dtype != "auto":
        return torch_dtype(config.dtype)
    with Checkpoint(config.model, model.scheme) as checkpoint:
        stored = checkpoint.stored()
    least = partial(_least, comm, device)
    together = replace(arithmetic, bfloat16=bool(least(arithmetic.bfloat16)), float16=bool(least(arithmetic.float16)))
    share = int(_memory("MemTotal", "SC_PHYS_PAGES") * WIDE_WEIGHTS_FRACTION) * comm.size // resolved.host_ranks
    room = least(min(share, _available_memory()))
    choice = choose(model.dtype, stored, together, config.max_num_seqs, room)
    if comm.rank == 0:
        logger.info("dtype %s: %s", str(choice.dtype).removeprefix("torch."), choice.why)
    return choice.dtype


def _cpu_runner(spec: RunnerSpec, phase: Phase) -> tuple[ModelRunner, PoolSizes, AdapterSlots | None]:
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
        memory = int(_available_memory() * CPU_KV_FRACTION) // spec.resolved.host_ranks
    sizes = _agree_on_blocks(comm, spec.sizes_in(memory), device)
    pools, kinds = spec.pools(sizes), spec.kinds
    of_kinds = [range(shape.layers)] if kinds is None else [kinds.layers(narrow) for narrow in (False, True)]
    backends: list[AttentionBackend] = []
    for pool, layers in zip(pools, of_kinds, strict=True):
        if isinstance(model, Decoder):
            forms = [model.forms[layer] for layer in layers]
            backends.append(select_backend(config.attention, pool=pool, heads=shape.heads, forms=forms, dtype=spec.dtype))
        else:
            backends.append(model.attention_over(pool, config.attention, layers))
    model.attention = backends[0] if kinds is None else KindsAttention(backends, kinds)
    sampler = Sampler(
        vocab_size=spec.model.vocab_size, local_vocab=shape.vocab, comm=comm, max_num_seqs=config.max_num_seqs, device=device,
        dtype=spec.dtype,
    )  # fmt: skip
    return ModelRunner(model, sampler, spec.constraints, config.max_num_seqs, *pools), sizes, lora


def _gpu_runner(spec: RunnerSpec, phase: Phase) -> tuple["GpuRunner", PoolSizes, AdapterSlots | None]:
    """The same on a GPU. The blocks are for sequences: one more is where padding writes."""
    from workers.execution.gpu.parts import GpuParts  # Triton comes with it

    with closing(GpuParts(spec)) as parts:
        parts.load(partial(phase, LOADING))
        phase(MEASURING, 0, 0)
        memory = spec.config.kv_memory if spec.config.kv_memory is not None else parts.measure()
        spare = sum(layout.block_bytes for layout in spec.layouts)
        sizes = _agree_on_blocks(spec.comm, spec.sizes_in(memory - spare), spec.device)
        return parts.runner(sizes, partial(phase, CAPTURING)), sizes, parts.lora


def _host_pools(spec: RunnerSpec, sizes: PoolSizes, phase: Phase) -> list[KVPool]:
    """Blocks in host memory, for each kind of layer as large a part of it as of the device's: on a CPU committed as they are
    first written, for a GPU pinned at once.

    Errors: ValueError if not even one fits, RuntimeError where so much cannot be pinned.
    """
    phase(PINNING, 0, 0)
    memory, layouts = spec.config.host_kv_memory, spec.layouts
    if memory < sum(layout.block_bytes for layout in layouts):
        raise ValueError(f"host_kv_memory={memory:,} holds no block: one takes {spec.layout.block_bytes:,} bytes")
    taken = [blocks * layout.block_bytes for blocks, layout in zip(sizes, layouts, strict=False)]
    parts = [max(1, memory * of // sum(taken) // layout.block_bytes) for of, layout in zip(taken, layouts, strict=True)]
    agreed = _agree_on_blocks(spec.comm, PoolSizes(*parts), spec.device)
    made = []
    for blocks, layout in zip(agreed, layouts, strict=False):
        if spec.comm.rank == 0:
            logger.info("host tier: %d blocks, %s bytes a rank", blocks, f"{blocks * layout.block_bytes:,}")
        made.append(KVPool(layout, blocks, "cpu", pinned=spec.device.type == "cuda"))
    return made


def _agree_on_blocks(comm: Communicator, sizes: PoolSizes, device: torch.device) -> PoolSizes:
    """The smallest pools of the group: a block id must be valid on every rank."""
    return PoolSizes(*(_least(comm, device, blocks) for blocks in sizes))


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
