"""What attention over blocks must give: dense float64 softmax, sequence by sequence; and the steps to compare it on.

Imports torch, the pool and the step; no backend.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from workers.attention.base import AttentionBackend, PagedAttention
from workers.attention.forms import Form
from workers.step import StepInput

SPARE_BLOCKS = 3
NO_BLOCK = 1 << 30
"""In place of blocks that a layer does not see, whoever holds them: must not be followed."""


class DeviceAttention(AttentionBackend, PagedAttention, Protocol):
    """A backend that can do both."""


def make_step(query_lens: list[int], context_lens: list[int], block_size: int, seed: int = 0) -> StepInput:
    """A step on the CPU with shuffled blocks. Block 0 belongs to nobody, though unused block-table entries name it."""
    needed = [-(-context // block_size) for context in context_lens]
    blocks = 1 + np.random.default_rng(seed).permutation(sum(needed) + SPARE_BLOCKS - 1)
    tables = np.zeros((len(needed), max(needed) + 1), np.int32)
    for row, (count, end) in enumerate(zip(needed, np.cumsum(needed), strict=True)):
        tables[row, :count] = blocks[end - count : end]
    ranges = [np.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)]
    positions = np.concatenate(ranges).astype(np.int64)
    owner = np.repeat(np.arange(len(needed)), query_lens)
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    queries, contexts = np.array(query_lens, np.int32), np.array(context_lens, np.int32)
    return StepInput(
        tokens=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_starts=torch.from_numpy(np.concatenate(([0], np.cumsum(queries))).astype(np.int32)),
        context_lens=torch.from_numpy(contexts),
        block_tables=torch.from_numpy(tables),
        sample_at=torch.zeros(0, dtype=torch.int64),
        decodes=next((i for i, q in enumerate(query_lens) if q > 1), len(query_lens)),
        host_query_lens=queries,
        host_context_lens=contexts,
        host_block_tables=tables,
    )


def blocks_of(step: StepInput, block_size: int) -> int:
    """How large a pool the step wants."""
    return int((-(-step.host_context_lens // block_size)).sum()) + SPARE_BLOCKS


def to_device(step: StepInput, device: str) -> StepInput:
    names = ("tokens", "positions", "slots", "query_starts", "context_lens", "block_tables", "sample_at")
    return replace(step, **{name: getattr(step, name).to(device) for name in names})


@dataclass(frozen=True, slots=True)
class Problem:
    """One layer of one step: random queries and KV, the pool as the backend finds it, the answer in float64."""

    step: StepInput
    pool: KVPool
    query: Tensor  # [tokens, heads, head_dim]
    key: Tensor  # [tokens, kv_heads, head_dim]
    value: Tensor
    layer: int
    expected: Tensor  # [tokens, heads, head_dim] float64, on the CPU
    forms: list[Form]  # of each layer
    sinks: Tensor | None  # [heads], where the form has them


def make_problem(
    step: StepInput, layout: BlockLayout, heads: int, device: str = "cpu", seed: int = 0, form: Form | None = None
) -> Problem:
    """Every slot that must not be read holds NaN, the step's own slots included until the backend writes them. form: of the
    last layer, None: plain."""
    form = form or Form(layout.head_dim**-0.5)
    pool = KVPool(layout, blocks_of(step, layout.block_size), device)
    pool.data.fill_(float("nan"))
    layer = layout.layers - 1
    generator = torch.Generator().manual_seed(seed)
    sinks = torch.randn(heads, generator=generator).to(pool.dtype) if form.sinks else None
    queries, keys, values, expected = [], [], [], []
    sequences = zip(step.host_query_lens.tolist(), step.host_context_lens.tolist(), step.host_block_tables, strict=True)
    for new, context, table in sequences:
        query = torch.randn(new, heads, layout.head_dim, generator=generator).to(pool.dtype)
        key, value = torch.randn(2, context, layout.kv_heads, layout.head_dim, generator=generator).to(pool.dtype)
        position = torch.arange(lowest_seen(form, context - new), context - new)
        at = torch.from_numpy(table).long()[position // layout.block_size].to(device), (position % layout.block_size).to(device)
        pool.keys(layer)[at] = key[position].to(device)
        pool.values(layer)[at] = value[position].to(device)
        queries.append(query)
        keys.append(key[context - new :])
        values.append(value[context - new :])
        expected.append(dense(query.double(), key.double(), value.double(), form, sinks))
        table[: lowest_seen(form, context - new) // layout.block_size] = NO_BLOCK  # the step's own, on host and device
    query, key, value = (torch.cat(parts).to(device) for parts in (queries, keys, values))
    forms = [*[Form(layout.head_dim**-0.5)] * layer, form]
    told = None if sinks is None else sinks.to(device)
    return Problem(to_device(step, device), pool, query, key, value, layer, torch.cat(expected), forms, told)


def lowest_seen(form: Form, position: int) -> int:
    """The first position that a token at `position` sees."""
    lowest = 0 if form.window is None else max(0, position - form.window + 1)
    return lowest if form.chunk is None else max(lowest, position // form.chunk * form.chunk)


def dense(query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None) -> Tensor:
    """query [queries, heads, dim] are the last tokens of key, value [context, kv_heads, dim]; KV is repeated per group."""
    new, heads, _ = query.shape
    context, kv_heads, _ = key.shape
    key, value = (kv.repeat_interleave(heads // kv_heads, dim=1) for kv in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * form.scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    keys, seen = torch.arange(context, device=query.device), torch.zeros(new, context, dtype=torch.bool, device=query.device)
    for row, position in enumerate(range(context - new, context)):
        seen[row] = (keys >= lowest_seen(form, position)) & (keys <= position)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:  # a key of their own, whose value is nothing
        scores = torch.cat((scores, sinks.to(query)[:, None, None].expand(-1, new, 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :context], value)
