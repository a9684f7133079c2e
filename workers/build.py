"""Makes one rank ready to step: weights, KV pool, attention, sampler, batch. What a worker does between birth and its loop.

Imports every part of the tensor side; nothing imports it but actors and the in-process cluster.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kvcache.layout import PageLayout
from kvcache.pool import KVPool
from workers.attention.select import select_backend
from workers.config import WorkerConfig
from workers.execution.runner import ModelRunner
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Rank
from workers.model.architectures import ModelConfig, RankShape, read_config, torch_dtype
from workers.model.decoder import load_model
from workers.parallel.communicator import Communicator
from workers.sampling.constraints import Constraints
from workers.sampling.grammar import load_tokenizer
from workers.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

Phase = Callable[[str, int, int], None]
"""What the build is doing, how much of it is done, and how much there is; 0 of 0 where nobody can say."""

LOADING, MEASURING, PINNING = "loading weights", "measuring memory", "reserving host memory"

MASK_THREADS = 8
"""Threads of a rank for the masks of grammars, at most: half a millisecond of work for a row whose text is free."""

CPU_KV_FRACTION = 0.4
"""Share of a host's available memory that its ranks' KV pools may take together, when nobody says."""


@dataclass(frozen=True, slots=True)
class Built:
    """A rank that can step, and what its mover works on. host: its pages in host memory, None without such a tier."""

    rank: Rank
    pool: KVPool
    host: KVPool | None

    @property
    def pages(self) -> int:
        return self.pool.pages

    @property
    def slots(self) -> int:
        """Pages of host memory; equal on all ranks of a group."""
        return self.host.pages if self.host is not None else 0


def build_rank(config: WorkerConfig, comm: Communicator, phase: Phase = lambda *_: None) -> Built:
    """Loads this rank's shard. All ranks of the group call it together.

    Errors: CheckpointError, ValueError (memory, attention backend), torch's out-of-memory error.
    """
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    model_config = read_config(Path(config.model))
    shape = model_config.shard(comm.rank, comm.size)
    dtype = model_config.dtype if config.dtype == "auto" else torch_dtype(config.dtype)
    layout = PageLayout(config.page_size, shape.layers, shape.kv_heads, shape.head_dim, str(dtype).removeprefix("torch."))
    first_pages = layout.pages_for(config.step_tokens)
    pool = KVPool(layout, first_pages, device)
    attention = select_backend(config.attention, pool=pool, heads=shape.heads)
    model = load_model(config.model, model_config, comm, dtype, device, attention, partial(phase, LOADING))
    sampler = _make_sampler(config, model_config, shape, comm, dtype, device)
    vocabulary = shape.vocab * comm.size  # with the ids that fill it up to a multiple of the ranks
    read = partial(load_tokenizer, Path(config.model), vocabulary, model_config.eos_ids)
    threads = max(config.threads, min(MASK_THREADS, (os.cpu_count() or 1) // config.ranks_on_host))
    runner = ModelRunner(model, sampler, Constraints(read, vocabulary, threads), config.rows, pool)
    phase(MEASURING, 0, 0)
    try:
        memory = _kv_memory(config, runner, layout)
        pages = _agree_on_pages(comm, _useful_pages(config, layout, memory), device)
        pool = runner.pool = KVPool(layout, pages, device)
        model.attention = attention = select_backend(config.attention, pool=pool, heads=shape.heads)
        host = _host_pool(config, layout, comm, device, phase) if config.host_kv_memory else None
    except BaseException:
        runner.close()
        raise
    if comm.rank == 0:
        logger.info("KV pool: %d pages of %d tokens, %s bytes a rank, attention %s", pages, config.page_size,
                    f"{pages * layout.page_bytes:,}", attention.name)  # fmt: skip
    batch = ResidentBatch(config.rows, config.page_size, config.step_tokens, config.max_model_len)
    return Built(Rank(batch, runner, config.depth), pool, host)


def _make_sampler(
    config: WorkerConfig,
    model: ModelConfig,
    shape: RankShape,
    comm: Communicator,
    dtype: torch.dtype,
    device: torch.device,
) -> Sampler:
    return Sampler(
        vocab_size=model.vocab_size, local_vocab=shape.vocab, comm=comm, rows=config.rows, device=device, dtype=dtype
    )


def _kv_memory(config: WorkerConfig, runner: ModelRunner, layout: PageLayout) -> int:
    """Bytes for this rank's pool: as told, or what is left: on a GPU after the largest step has been run."""
    if config.kv_memory is not None:
        return config.kv_memory
    if config.device == "cpu":
        return int(_available_memory() * CPU_KV_FRACTION) // config.ranks_on_host
    torch.cuda.reset_peak_memory_stats()
    _run_largest_step(config, runner)
    torch.cuda.synchronize()
    probe = layout.pages_for(config.step_tokens) * layout.page_bytes
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    return int(total * config.gpu_memory_fraction) - others - (torch.cuda.max_memory_allocated() - probe)


def _host_pool(config: WorkerConfig, layout: PageLayout, comm: Communicator, device: torch.device, phase: Phase) -> KVPool:
    """Pages in host memory: on a CPU committed as they are first written, for a GPU pinned at once.

    Errors: ValueError if not even one fits, RuntimeError where so much cannot be pinned.
    """
    phase(PINNING, 0, 0)
    if config.host_kv_memory < layout.page_bytes:
        raise ValueError(f"host_kv_memory={config.host_kv_memory:,} holds no page: one takes {layout.page_bytes:,} bytes")
    slots = _agree_on_pages(comm, layout.pages_in(config.host_kv_memory), device)
    if comm.rank == 0:
        logger.info("host tier: %d pages, %s bytes a rank", slots, f"{slots * layout.page_bytes:,}")
    return KVPool(layout, slots, "cpu", pinned=device.type == "cuda")


def _run_largest_step(config: WorkerConfig, runner: ModelRunner) -> None:
    """One prefill of as many tokens as a step may have, in the first pages, so that peak memory is known."""
    batch = ResidentBatch(config.rows, config.page_size, config.step_tokens, config.max_model_len)
    length = min(config.step_tokens, config.max_model_len - 1)
    batch.block_table[0, : -(-length // config.page_size)] = np.arange(-(-length // config.page_size))
    batch.known[0], batch.slots[0], batch.lease[0] = length + 1, length, 0
    batch.tokens[0] = np.zeros(length + 1, np.int32)
    step: Launched = batch.launch(batch.plan())
    runner.execute(batch, step).wait()


def _useful_pages(config: WorkerConfig, layout: PageLayout, memory: int) -> int:
    """Whole pages in `memory`, no more than all rows at full length could fill. Errors: ValueError if not even one fits."""
    return min(layout.pages_in(memory), config.rows * layout.pages_for(config.max_model_len))


def _agree_on_pages(comm: Communicator, pages: int, device: torch.device) -> int:
    """The smallest pool of the group: a page id must be valid on every rank."""
    return int(comm.all_gather(torch.tensor([pages], dtype=torch.int64, device=device)).min())


def _available_memory() -> int:
    """Bytes that the host can give without swapping (Linux; elsewhere the free pages)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
