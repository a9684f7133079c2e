"""Chunk attention in Triton against dense float64 attention: ragged chunks, tiles of every kind, block borders, garbage."""

from dataclasses import replace

import pytest
import torch

from kvcache.layout import BlockLayout
from tests.workers.attention.attention_reference import Problem, make_problem, make_step
from tests.workers.kernels.devices import ATTENTION_TOLERANCE, CUDA, every_attention_dtype, one_attention_dtype

pytest.importorskip("triton")

from workers.kernels.attention.chunks import ChunkAttention, ChunkConfig


def check(problem: Problem, config: ChunkConfig | None = None, spare: int = 0) -> None:
    """Writes the chunks' own keys and values, then attends; `spare`: tokens that the plan allows for beyond those there."""
    step, pool, layer = problem.step, problem.pool, problem.layer
    block, slot = step.slots // pool.layout.block_size, step.slots % pool.layout.block_size
    pool.data[block, layer, 0, slot], pool.data[block, layer, 1, slot] = problem.key, problem.value
    attention = ChunkAttention(pool, problem.query.shape[1], config)
    tiles = attention.plan(step.query_starts, step.context_lens, len(problem.query) + spare)
    tables = torch.nn.functional.pad(step.block_tables, (0, 50), value=1 << 30)  # no block: must not be followed
    out = torch.full_like(problem.query, float("nan"))
    attention.run(layer, problem.query, tables, step.context_lens, tiles, out)
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=ATTENTION_TOLERANCE[pool.layout.dtype], rtol=0)


def chunks(block: int, kv_heads: int, group: int, head_dim: int, dtype: str, device: str) -> Problem:
    queries, contexts = [1, block, 3, 70, 20], [1, block, block + 2, 70, 150]
    layout = BlockLayout(block_size=block, layers=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    return make_problem(make_step(queries, contexts, block), layout, heads=kv_heads * group, device=device)


SMALL = ChunkConfig(rows=32, keys=32, warps=4)


@every_attention_dtype
@pytest.mark.parametrize("block", [16, 64])
def test_ragged_chunks_over_block_borders(dtype: str, device: str, block: int) -> None:
    check(chunks(block, 2, 2, 64, dtype, device))


@one_attention_dtype
def test_blocks_of_256(dtype: str, device: str) -> None:
    layout = BlockLayout(block_size=256, layers=1, kv_heads=1, head_dim=64, dtype=dtype)
    check(make_problem(make_step([20, 60], [270, 256], 256), layout, heads=2, device=device))


@one_attention_dtype
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 128), (4, 96), (7, 128), (8, 64)])
def test_heads(dtype: str, device: str, group: int, head_dim: int) -> None:
    check(chunks(16, 1, group, head_dim, dtype, device), spare=40)


@one_attention_dtype
@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, keys=64), replace(SMALL, rows=64, stages=2)],
    ids=str,
)
def test_every_way_to_tile(dtype: str, device: str, config: ChunkConfig) -> None:
    for block in (16, 64) if CUDA else (16 if config.keys > SMALL.keys else 64,):
        check(chunks(block, 2, 3, 64, dtype, device), config, spare=200)


@one_attention_dtype
@pytest.mark.parametrize("group", [1, 4])
def test_spans_by_descriptors_and_where_they_are_longer_than_a_block_without(dtype: str, device: str, group: int) -> None:
    for block in (16, 64):
        check(chunks(block, 2, group, 64, dtype, device), replace(SMALL, described=True))


@one_attention_dtype
def test_more_sequences_than_one_look(dtype: str, device: str) -> None:
    """The plan looks at 64 sequences at a time: chunks before and behind that border."""
    layout = BlockLayout(block_size=16, layers=1, kv_heads=1, head_dim=16, dtype=dtype)
    queries = [2 + row % 3 for row in range(70)]
    check(make_problem(make_step(queries, [count + 3 for count in queries], 16), layout, heads=2, device=device), SMALL)
