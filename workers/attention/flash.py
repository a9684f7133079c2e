"""Attention by flash-attn's paged kernels, whichever of its generations is installed.

Imports torch, the pool and the step; flash-attn only inside `load_kernels`, triton only for the fused write.

    generation  imported as                             blocks of      what it cannot do
    2           flash_attn                              256, 512, ..  splits KV only when every query has length 1
    3           flash_attn_interface, or behind 2's     any           runs on Hopper only
                names (version "2.x+fa3...")
    4           flash_attn.cute                         any           head_dim 64, 96, 128; no split KV on Hopper

All of them take the pool's per-layer views, whose blocks lie far apart: strides are free but for the last dimension. Scales,
windows and soft caps they take as well, some builds sinks too; what one does not, nor chunks, is for another backend (`takes`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.base import Chunks
from workers.attention.forms import Form, plain_forms
from workers.attention.write import KvWriter, TorchWriter, dense_rows
from workers.kernels.attention.prefixes import NOT_SHARED, SharedPrefixes
from workers.kernels.heads.turn import HeadTurn
from workers.step import StepInput


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Decodes as flash-attn wants them."""

    starts: Tensor  # [decodes + 1] int32: each has one query token
    metadata: Tensor | None  # generation 3's own plan, where the package at hand can make it ahead of the layers


@dataclass(frozen=True, slots=True)
class FlashChunkPlan:
    """Chunks as flash-attn wants them."""

    chunks: Chunks
    context_starts: Tensor  # [chunks + 1] int32, prefix sums of the context lengths


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """The step: decodes and chunks in calls of their own."""

    targets: Tensor  # [tokens] for the writer
    decodes: int
    decode: DecodePlan | None
    chunk: FlashChunkPlan | None


Decode = Callable[..., Tensor]
"""query [decodes, heads, head_dim], keys, values [block, slot, kv_head, head_dim], lengths, tables, plan, and what `_told` says
of the layer's form -> like query."""
Chunk = Callable[..., Tensor]
"""query [chunk tokens, heads, head_dim], keys and values as above, plan, and the same -> like query."""
Schedule = Callable[..., Tensor]
"""Generation 3's `get_scheduler_metadata`."""


@dataclass(frozen=True, slots=True)
class FlashKernels:
    """One generation of flash-attn: what it accepts and how it is called."""

    version: str
    block_multiple: int
    head_dims: frozenset[int]
    capabilities: tuple[int, ...]  # major CUDA compute capabilities
    decode: Decode
    chunk: Chunk
    arguments: frozenset[str]  # that both calls know
    schedule: Schedule | None = None
    bounds: bool = True  # lengths that it wants to know on the host may be upper bounds, as a captured step has them


EVERY_EIGHTH = frozenset(range(8, 257, 8))
SINKS = ("s_aux", "learnable_sink")
"""What builds of generation 3 and generation 4 call them."""
PLANNED = {"softmax_scale", *SINKS}
"""What of a form a plan made ahead does not depend on."""


def load_kernels() -> FlashKernels:
    """Import the newest generation that is proven for decodes: 3, then 2, then 4. ImportError names all that failed."""
    failures = []
    for load in (_load_3, _load_2, _load_4):
        try:
            return load()
        except (ImportError, OSError, RuntimeError) as error:  # a library built for another torch raises the latter two
            failures.append(f"{load.__name__[-1]}: {error}")
    raise ImportError(f"no flash-attn can be imported ({'; '.join(failures)})")


def _decoding(with_kvcache: Callable[..., Any], tables_name: str) -> Decode:
    """tables_name: what the generation calls block tables."""

    def decode(
        query: Tensor, keys: Tensor, values: Tensor, lens: Tensor, tables: Tensor, plan: DecodePlan, **told: Any
    ) -> Tensor:
        if plan.metadata is not None and told.keys() <= PLANNED:
            told["scheduler_metadata"] = plan.metadata
        told[tables_name] = tables
        return _first(with_kvcache(query[:, None], keys, values, cache_seqlens=lens, causal=True, **told))[:, 0]

    return decode


def _load_2() -> FlashKernels:
    import flash_attn
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    scheduled = "scheduler_metadata" in signature(flash_attn_with_kvcache).parameters
    schedule = getattr(flash_attn, "get_scheduler_metadata", None) if scheduled else None

    def chunk(query: Tensor, keys: Tensor, values: Tensor, plan: FlashChunkPlan, **told: Any) -> Tensor:
        chunks = plan.chunks
        out: Tensor = flash_attn_varlen_func(
            query, keys, values, chunks.query_starts, plan.context_starts, chunks.max_query, chunks.max_context,
            causal=True, block_table=chunks.block_tables, **told,
        )  # fmt: skip
        return out

    decode = _decoding(flash_attn_with_kvcache, "block_table")
    version, known = str(flash_attn.__version__), _arguments(flash_attn_with_kvcache, flash_attn_varlen_func)
    if "fa3" in version:
        return FlashKernels(version, 1, EVERY_EIGHTH, (9,), decode, chunk, known, schedule)
    return FlashKernels(version, 256, EVERY_EIGHTH, (8, 9, 10, 11, 12), decode, chunk, known)


def _load_3() -> FlashKernels:
    import flash_attn_interface
    from flash_attn_interface import flash_attn_with_kvcache

    schedule = getattr(flash_attn_interface, "get_scheduler_metadata", None)

    def chunk(query: Tensor, keys: Tensor, values: Tensor, plan: FlashChunkPlan, **told: Any) -> Tensor:
        chunks = plan.chunks
        out = flash_attn_with_kvcache(
            query, keys, values, cache_seqlens=chunks.context_lens, page_table=chunks.block_tables,
            cu_seqlens_q=chunks.query_starts, max_seqlen_q=chunks.max_query, causal=True, **told,
        )  # fmt: skip
        return _first(out)

    decode = _decoding(flash_attn_with_kvcache, "page_table")
    return FlashKernels("3", 1, EVERY_EIGHTH, (9,), decode, chunk, _arguments(flash_attn_with_kvcache), schedule)


def _load_4() -> FlashKernels:
    from flash_attn.cute import flash_attn_varlen_func

    def decode(
        query: Tensor, keys: Tensor, values: Tensor, lens: Tensor, tables: Tensor, plan: DecodePlan, **told: Any
    ) -> Tensor:
        return _first(
            flash_attn_varlen_func(
                query, keys, values, cu_seqlens_q=plan.starts, max_seqlen_q=1, seqused_k=lens, page_table=tables, causal=True,
                **told,
            )
        )  # fmt: skip

    def chunk(query: Tensor, keys: Tensor, values: Tensor, plan: FlashChunkPlan, **told: Any) -> Tensor:
        chunks = plan.chunks
        return _first(
            flash_attn_varlen_func(
                query, keys, values, cu_seqlens_q=chunks.query_starts, max_seqlen_q=chunks.max_query,
                seqused_k=chunks.context_lens, page_table=chunks.block_tables, causal=True, **told,
            )
        )  # fmt: skip

    known = _arguments(flash_attn_varlen_func)
    return FlashKernels("4", 1, frozenset((64, 96, 128)), (9, 10, 11), decode, chunk, known, bounds=False)


def _arguments(*calls: Callable[..., Any]) -> frozenset[str]:
    return frozenset.intersection(*(frozenset(signature(call).parameters) for call in calls))


def _told(form: Form, head_dim: int, sinks: Tensor | None, known: frozenset[str]) -> dict[str, Any]:
    """A layer's form as all generations are told it, nothing of a plain one; a window counts the tokens before the query's
    own."""
    told: dict[str, Any] = {}
    if form.scale != head_dim**-0.5:
        told["softmax_scale"] = form.scale
    if form.window is not None:
        told["window_size"] = (form.window - 1, 0)
    if form.softcap is not None:
        told["softcap"] = form.softcap
    if form.sinks:
        told[next((name for name in SINKS if name in known), SINKS[0])] = sinks
    return told


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: generations 3 and 4 give the log-sum-exp beside it in some releases."""
    return result[0] if isinstance(result, tuple) else result


class FlashAttention:
    """flash-attn over one pool, for layers of forms that it takes. Raises ValueError where the pool's shape is not what the
    kernels take.

    Decodes use device tensors only and may be captured in a CUDA graph, apart from generation 4, which takes host maxima.
    """

    name = "flash"
    prefixes = NOT_SHARED

    def __init__(self, pool: KVPool, kernels: FlashKernels, heads: int, forms: Sequence[Form] | None = None) -> None:
        layout = pool.layout
        if pool.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"flash-attn serves bfloat16 and float16, not {layout.dtype}: choose another dtype or attention")
        if layout.block_size % kernels.block_multiple:
            raise ValueError(
                f"flash-attn {kernels.version} wants blocks of a multiple of {kernels.block_multiple} tokens, not "
                f"{layout.block_size}: choose block_size {kernels.block_multiple} or another attention"
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
        self.bounds = kernels.bounds
        self._pool = pool
        self._kernels = kernels
        self._forms = forms or plain_forms(layout.layers, layout.head_dim)
        self._heads = heads
        self._writer = _writer(pool)

    def takes(self, form: Form) -> bool:
        """Whether the generation at hand computes this."""
        return form.chunk is None and self._told(form, None).keys() <= self._kernels.arguments

    def _told(self, form: Form, sinks: Tensor | None) -> dict[str, Any]:
        return _told(form, self._pool.layout.head_dim, sinks, self._kernels.arguments)

    def plan(self, step: StepInput) -> FlashPlan:
        decodes = step.decodes
        queries = step.host_query_lens[decodes:]
        chunk = None
        if len(queries):
            starts = step.query_starts[decodes:] - decodes  # each decode has one query token
            longest = int(queries.max()), int(step.host_context_lens[decodes:].max())
            contexts, tables = step.context_lens[decodes:], step.block_tables[decodes:]
            chunk = self.plan_chunks(Chunks(starts, contexts, tables, len(step.tokens) - decodes, *longest))
        decode = self.plan_decode(step.context_lens, decodes, step.block_tables.shape[1]) if decodes else None
        return FlashPlan(self._writer.targets(step.slots), decodes, decode, chunk)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: StepInput, plan: FlashPlan,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self._writer.write(layer, key, value, plan.targets)
        rows = slice(plan.decodes)
        parts = []
        if plan.decode is not None:
            decoded = query[rows], step.block_tables[rows], step.context_lens[rows]
            parts.append(self.decode(layer, *decoded, plan.decode, sinks=sinks))
        if plan.chunk is not None:
            parts.append(self.chunks(layer, query[plan.decodes :], plan.chunk, sinks=sinks))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def plan_decode(
        self, context_lens: Tensor, batch: int, blocks: int | None = None, shared: SharedPrefixes | None = None  # noqa: ARG002
    ) -> DecodePlan:
        """blocks: the width of the block tables; without it generation 3 plans each layer anew, for nothing but time."""
        layout, schedule = self._pool.layout, self._kernels.schedule
        metadata = None
        if schedule is not None and blocks is not None:
            metadata = schedule(
                batch_size=batch, max_seqlen_q=1, max_seqlen_k=blocks * layout.block_size, num_heads_q=self._heads,
                num_heads_kv=layout.kv_heads, headdim=layout.head_dim, cache_seqlens=context_lens[:batch],
                qkv_dtype=self._pool.dtype, block_size=layout.block_size, causal=True,
            )  # fmt: skip
        starts = torch.arange(batch + 1, dtype=torch.int32, device=context_lens.device)
        return DecodePlan(starts, metadata)

    def turns(self, batch: int) -> bool:  # noqa: ARG002
        return False

    def decode(
        self, layer: int, query: Tensor, block_tables: Tensor, context_lens: Tensor, plan: DecodePlan,
        out: Tensor | None = None, turn: HeadTurn | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert turn is None, "flash-attn's kernels take queries that are turned"
        keys, values = self._pool.keys(layer), self._pool.values(layer)
        told = self._told(self._forms[layer], sinks)
        result = self._kernels.decode(dense_rows(query), keys, values, context_lens, block_tables, plan, **told)
        return result if out is None else out.copy_(result)

    def plan_chunks(self, chunks: Chunks) -> FlashChunkPlan:
        return FlashChunkPlan(chunks, torch.nn.functional.pad(chunks.context_lens.cumsum(0, dtype=torch.int32), (1, 0)))

    def chunks(
        self, layer: int, query: Tensor, plan: FlashChunkPlan, out: Tensor | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        told = self._told(self._forms[layer], sinks)
        result = self._kernels.chunk(dense_rows(query), self._pool.keys(layer), self._pool.values(layer), plan, **told)
        return result if out is None else out.copy_(result)


def _writer(pool: KVPool) -> KvWriter:
    """One fused launch where triton is installed, torch's index operations otherwise."""
    if pool.device.type == "cuda":
        try:
            from workers.attention.triton import TritonWriter
        except ImportError:
            return TorchWriter(pool)
        return TritonWriter(pool)
    return TorchWriter(pool)
