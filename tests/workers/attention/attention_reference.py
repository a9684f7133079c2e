"""What attention over blocks must give: dense float64 softmax, sequence by sequence; and the steps to compare it on.

Imports torch, the pool and the step; no backend.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from workers.execution.step import StepInput

SPARE_BLOCKS = 3


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


def make_problem(step: StepInput, layout: BlockLayout, heads: int, device: str = "cpu", seed: int = 0) -> Problem:
    """Every slot that must not be read holds NaN, the step's own slots included until the backend writes them."""
    pool = KVPool(layout, blocks_of(step, layout.block_size), device)
    pool.data.fill_(float("nan"))
    layer = layout.layers - 1
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values, expected = [], [], [], []
    sequences = zip(step.host_query_lens.tolist(), step.host_context_lens.tolist(), step.host_block_tables, strict=True)
    for new, context, table in sequences:
        query = torch.randn(new, heads, layout.head_dim, generator=generator).to(pool.dtype)
        key, value = torch.randn(2, context, layout.kv_heads, layout.head_dim, generator=generator).to(pool.dtype)
        position = torch.arange(context - new)
        at = torch.from_numpy(table).long()[position // layout.block_size].to(device), (position % layout.block_size).to(device)
        pool.keys(layer)[at] = key[: context - new].to(device)
        pool.values(layer)[at] = value[: context - new].to(device)
        queries.append(query)
        keys.append(key[context - new :])
        values.append(value[context - new :])
        expected.append(dense(query.double(), key.double(), value.double()))
    query, key, value = (torch.cat(parts).to(device) for parts in (queries, keys, values))
    return Problem(to_device(step, device), pool, query, key, value, layer, torch.cat(expected))


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [queries, heads, dim] are the last tokens of key, value [context, kv_heads, dim]; KV is repeated per group."""
    new, heads, dim = query.shape
    context, kv_heads, _ = key.shape
    key, value = (kv.repeat_interleave(heads // kv_heads, dim=1) for kv in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(dim)
    later = torch.arange(context) > torch.arange(context - new, context)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), value)
