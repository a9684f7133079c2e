"""Attention by flash-attn's paged kernels, whichever of its generations is installed.

Imports torch, the pool and the step; flash-attn only inside `load_kernels`, triton only for the fused write.

    generation  imported as                             pages of      what it cannot do
    2           flash_attn                              256, 512, ..  splits KV only when every query has length 1
    3           flash_attn_interface, or behind 2's     any           runs on Hopper only
                names (version "2.x+fa3...")
    4           flash_attn.cute                         any           head_dim 64, 96, 128; no split KV on Hopper

All of them take the pool's per-layer views, whose pages lie far apart: strides are free but for the last dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.write import KvWriter, RowWriter, dense_rows
from workers.execution.step import StepInput


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """The step as flash-attn wants it: decodes and chunks in calls of their own."""

    rows: Tensor  # [tokens] for the writer
    decodes: int
    chunks: int
    starts: Tensor  # [chunks + 1] int32, prefix sums of the chunks' query lengths
    contexts: Tensor  # [chunks] int32
    context_starts: Tensor  # [chunks + 1] int32, their prefix sums
    tables: Tensor  # [chunks, max_pages] int32
    max_query: int
    max_context: int


Decode = Callable[[Tensor, Tensor, Tensor, StepInput], Tensor]
"""query [decodes, heads, head_dim], keys and values [page, slot, kv_head, head_dim], step -> like query."""
Chunk = Callable[[Tensor, Tensor, Tensor, FlashPlan], Tensor]
"""query [chunk tokens, heads, head_dim], keys and values as above, plan -> like query."""


@dataclass(frozen=True, slots=True)
class FlashKernels:
    """One generation of flash-attn: what it accepts and how it is called."""

    version: str
    page_multiple: int
    head_dims: frozenset[int]
    capabilities: tuple[int, ...]  # major CUDA compute capabilities
    decode: Decode
    chunk: Chunk


EVERY_EIGHTH = frozenset(range(8, 257, 8))


def load_kernels() -> FlashKernels:
    """Import the newest generation that is proven for decodes: 3, then 2, then 4. ImportError names all that failed."""
    failures = []
    for load in (_load_3, _load_2, _load_4):
        try:
            return load()
        except (ImportError, OSError, RuntimeError) as error:  # a library built for another torch raises the latter two
            failures.append(f"{load.__name__[-1]}: {error}")
    raise ImportError(f"no flash-attn can be imported ({'; '.join(failures)})")


def _load_2() -> FlashKernels:
    import flash_attn
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    def decode(query: Tensor, keys: Tensor, values: Tensor, step: StepInput) -> Tensor:
        lens, tables = step.context_lens[: step.decodes], step.block_tables[: step.decodes]
        out: Tensor = flash_attn_with_kvcache(
            query[:, None], keys, values, cache_seqlens=lens, block_table=tables, causal=True
        )
        return out[:, 0]

    def chunk(query: Tensor, keys: Tensor, values: Tensor, plan: FlashPlan) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            query, keys, values, plan.starts, plan.context_starts, plan.max_query, plan.max_context,
            causal=True, block_table=plan.tables,
        )  # fmt: skip
        return out

    version = str(flash_attn.__version__)
    if "fa3" in version:
        return FlashKernels(version, 1, EVERY_EIGHTH, (9,), decode, chunk)
    return FlashKernels(version, 256, EVERY_EIGHTH, (8, 9, 10, 11, 12), decode, chunk)


def _load_3() -> FlashKernels:
    from flash_attn_interface import flash_attn_with_kvcache

    def decode(query: Tensor, keys: Tensor, values: Tensor, step: StepInput) -> Tensor:
        lens, tables = step.context_lens[: step.decodes], step.block_tables[: step.decodes]
        out = flash_attn_with_kvcache(query[:, None], keys, values, cache_seqlens=lens, page_table=tables, causal=True)
        return _first(out)[:, 0]

    def chunk(query: Tensor, keys: Tensor, values: Tensor, plan: FlashPlan) -> Tensor:
        out = flash_attn_with_kvcache(
            query, keys, values, cache_seqlens=plan.contexts, page_table=plan.tables, cu_seqlens_q=plan.starts,
            max_seqlen_q=plan.max_query, causal=True,
        )  # fmt: skip
        return _first(out)

    return FlashKernels("3", 1, EVERY_EIGHTH, (9,), decode, chunk)


def _load_4() -> FlashKernels:
    from flash_attn.cute import flash_attn_varlen_func

    def decode(query: Tensor, keys: Tensor, values: Tensor, step: StepInput) -> Tensor:
        lens, tables = step.context_lens[: step.decodes], step.block_tables[: step.decodes]
        starts = step.query_starts[: step.decodes + 1]
        return _first(
            flash_attn_varlen_func(
                query, keys, values, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lens, page_table=tables, causal=True
            )
        )

    def chunk(query: Tensor, keys: Tensor, values: Tensor, plan: FlashPlan) -> Tensor:
        return _first(
            flash_attn_varlen_func(
                query, keys, values, cu_seqlens_q=plan.starts, max_seqlen_q=plan.max_query, seqused_k=plan.contexts,
                page_table=plan.tables, causal=True,
            )
        )  # fmt: skip

    return FlashKernels("4", 1, frozenset((64, 96, 128)), (9, 10, 11), decode, chunk)


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: generations 3 and 4 give the log-sum-exp beside it in some releases."""
    return result[0] if isinstance(result, tuple) else result


class FlashAttention:
    """flash-attn over one pool. Raises ValueError where the pool's shape is not what the kernels take.

    Decodes use device tensors only and may be captured in a CUDA graph, apart from generation 4, which takes host maxima.
    """

    name = "flash"

    def __init__(self, pool: KVPool, kernels: FlashKernels) -> None:
        layout = pool.layout
        if pool.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"flash-attn serves bfloat16 and float16, not {layout.dtype}: choose another dtype or attention")
        if layout.page_size % kernels.page_multiple:
            raise ValueError(
                f"flash-attn {kernels.version} wants pages of a multiple of {kernels.page_multiple} tokens, not "
                f"{layout.page_size}: choose block_size {kernels.page_multiple} or another attention"
            )
        if layout.head_dim not in kernels.head_dims:
            raise ValueError(
                f"flash-attn {kernels.version} does not serve head_dim {layout.head_dim}: choose another attention backend"
            )
        if pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device)[0] not in kernels.capabilities:
            raise ValueError(
                f"flash-attn {kernels.version} does not run on {torch.cuda.get_device_name(pool.device)}: install another "
                "generation of it or choose another attention backend"
            )
        self._pool = pool
        self._kernels = kernels
        self._writer = _writer(pool)

    def plan(self, step: StepInput) -> FlashPlan:
        decodes = step.decodes
        contexts, queries = step.context_lens[decodes:], step.host_query_lens[decodes:]
        chunks = len(queries)
        return FlashPlan(
            rows=self._writer.rows(step.slots),
            decodes=decodes,
            chunks=chunks,
            starts=step.query_starts[decodes:] - decodes,  # each decode has one query token
            contexts=contexts,
            context_starts=torch.nn.functional.pad(contexts.cumsum(0, dtype=torch.int32), (1, 0)),
            tables=step.block_tables[decodes:],
            max_query=int(queries.max()) if chunks else 0,
            max_context=int(step.host_context_lens[decodes:].max()) if chunks else 0,
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: FlashPlan
    ) -> Tensor:
        self._writer.write(layer, key, value, plan.rows)
        keys, values = self._pool.keys(layer), self._pool.values(layer)
        query = dense_rows(query)
        if not plan.chunks:
            return self._kernels.decode(query, keys, values, step)
        if not plan.decodes:
            return self._kernels.chunk(query, keys, values, plan)
        decoded = self._kernels.decode(query[: plan.decodes], keys, values, step)
        return torch.cat((decoded, self._kernels.chunk(query[plan.decodes :], keys, values, plan)))


def _writer(pool: KVPool) -> KvWriter:
    """One fused launch where triton is installed, torch's index operations otherwise."""
    if pool.device.type == "cuda":
        try:
            from workers.attention.triton import TritonWriter
        except ImportError:
            return RowWriter(pool)
        return TritonWriter(pool)
    return RowWriter(pool)
