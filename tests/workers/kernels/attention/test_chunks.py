"""Chunk attention in Triton against dense float64 attention: ragged chunks, tiles of every kind, block borders, garbage."""

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from kvcache.layout import BlockLayout
from tests.workers.attention.attention_reference import Problem, make_problem, make_step
from tests.workers.kernels.devices import ATTENTION_TOLERANCE, CUDA, every_attention_dtype, one_attention_dtype

pytest.importorskip("triton")

from workers.kernels.attention.chunks import SPECIALIZED, ChunkAttention, ChunkConfig, may_specialize
from workers.kernels.attention.form import Form, plain_forms
from workers.kernels.launch import has_warpgroups


def write(problem: Problem) -> None:
    """The chunks' own keys and values."""
    step, data, layer, size = problem.step, problem.pool.data, problem.layer, problem.pool.layout.block_size
    block, slot = step.slots // size, step.slots % size
    data[block, layer, 0, slot], data[block, layer, 1, slot] = problem.key, problem.value


def check(problem: Problem, config: ChunkConfig | None = None, spare: int = 0) -> None:
    """Writes the chunks' own keys and values, then attends; `spare`: tokens that the plan allows for beyond those there."""
    step, pool, layer = problem.step, problem.pool, problem.layer
    write(problem)
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


PIECES = replace(SMALL, keys=16, least=2, shares=12)


@every_attention_dtype
@pytest.mark.parametrize("described", [False, True], ids=["pointers", "described"])
def test_few_tokens_after_long_contexts_are_cut_into_pieces(dtype: str, device: str, described: bool) -> None:
    """Of about equal length; one plan for several layers, whose pieces are merged in order: the same bits each time."""
    queries, contexts = [1, 20, 3, 40], [700, 35, 9, 400]
    layout = BlockLayout(block_size=16, layers=2, kv_heads=2, head_dim=64, dtype=dtype)
    problem = make_problem(make_step(queries, contexts, 16), layout, heads=4, device=device)
    write(problem)
    step = problem.step
    with patch("workers.kernels.attention.chunks.processors", return_value=4):
        attention = ChunkAttention(problem.pool, 4, replace(PIECES, described=described))
    tiles = attention.plan(step.query_starts, step.context_lens, len(problem.query) + 30)
    found = [row for row in tiles.table.tolist() if row[0] >= 0]
    of_tiles = {(sequence, first): pieces for sequence, first, _, _, _, pieces, *_ in found}
    assert [of_tiles[tile] for tile in ((0, 0), (1, 16), (1, 0), (2, 0))] == [8, 1, 1, 1]
    assert all(of_tiles[3, first] >= 4 for first in (0, 16, 32))
    assert sorted(piece for sequence, *_, piece, _, _, _ in found if sequence == 0) == list(range(8))
    outs = []
    for _ in range(2):
        outs.append(out := torch.full_like(problem.query, float("nan")))
        attention.run(problem.layer, problem.query, step.block_tables, step.context_lens, tiles, out)
    torch.testing.assert_close(outs[0].cpu().double(), problem.expected, atol=ATTENTION_TOLERANCE[dtype], rtol=0)
    assert torch.equal(*outs)
    assert tiles.partials is not None
    assert not tiles.partials.counters.any()


@one_attention_dtype
def test_what_fills_the_device_is_not_cut(dtype: str, device: str) -> None:
    """94 tokens in tiles of 16, of 2 KV heads, are 10 programs; nor are more tiles than one program cuts."""
    problem = chunks(16, 2, 2, 64, dtype, device)
    for processors, tokens, cut in ((10, 94, False), (11, 94, True), (11, 96, False), (400, 1960, True), (400, 2000, False)):
        with patch("workers.kernels.attention.chunks.processors", return_value=processors):
            attention = ChunkAttention(problem.pool, 4, replace(PIECES, shares=1))
        tiles = attention.plan(problem.step.query_starts, problem.step.context_lens, tokens)
        assert (tiles.partials is not None) == cut


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("group", [1, 2, 8, 64])
@pytest.mark.parametrize("block", [128, 256])
def test_warps_that_copy_and_warps_that_compute_cuda(dtype: str, group: int, block: int) -> None:
    """Chunks that begin and end anywhere in a span; one whose second half of a tile has no row; tiles that are none."""
    if not has_warpgroups(torch.device("cuda")):
        pytest.skip("of Hopper alone")
    queries, contexts = [1, 300, 3, 70, 129, 257], [1, 1000, block + 2, 70, 641, 257]
    layout = BlockLayout(block_size=block, layers=2, kv_heads=2, head_dim=128, dtype=dtype)
    problem = make_problem(make_step(queries, contexts, block), layout, heads=2 * group, device="cuda")
    check(problem, SPECIALIZED, spare=300)
    check(problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_heads_that_are_not_as_the_pool_names_them_cuda() -> None:
    """Two KV heads of 128 in the rows of one of 256: as layers of another shape have them."""
    if not has_warpgroups(torch.device("cuda")):
        pytest.skip("of Hopper alone")
    layout = BlockLayout(block_size=256, layers=2, kv_heads=1, head_dim=256, dtype="bfloat16")
    problem = make_problem(make_step([300, 70], [700, 70], 256), layout, heads=2, device="cuda")
    write(problem)
    step, query = problem.step, torch.randn(370, 4, 128, device="cuda").bfloat16()
    outs = []
    for config in (None, SPECIALIZED, ChunkConfig()):
        attention = ChunkAttention(problem.pool, 4, config, kv_heads=2, head_dim=128)
        outs.append(out := torch.full_like(query, float("nan")))
        tiles = attention.plan(step.query_starts, step.context_lens, len(query))
        attention.run(problem.layer, query, step.block_tables, step.context_lens, tiles, out)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[1], outs[2], atol=ATTENTION_TOLERANCE["bfloat16"], rtol=0)


def test_what_specialized_warps_are_not_for() -> None:
    """Asked of a Hopper: heads of 64, blocks that spans do not divide, odd groups, and whatever is not plain."""
    layout = BlockLayout(block_size=256, layers=2, kv_heads=1, head_dim=128, dtype="bfloat16")
    forms, bf16 = plain_forms(2, 128), torch.bfloat16

    def asked(
        layout: BlockLayout = layout, dtype: torch.dtype = bf16, dim: int = 128, group: int = 2,
        forms: Sequence[Form] = forms,
    ) -> bool:  # fmt: skip
        pool = make_problem(make_step([1], [1], layout.block_size), layout, heads=group, device="cpu").pool
        with patch("workers.kernels.attention.chunks.has_warpgroups", return_value=True):
            return may_specialize(pool, dtype, dim, group, forms)

    assert asked()
    assert asked(group=64)
    assert not asked(group=7)
    assert not asked(replace(layout, block_size=64))
    assert not asked(replace(layout, head_dim=64), dim=64)
    assert not asked(replace(layout, dtype="float32"), torch.float32)
    assert not asked(forms=[forms[0], replace(forms[0], window=16)])
    assert not asked(forms=[forms[0], replace(forms[0], sinks=True)])
    assert not has_warpgroups(torch.device("cpu"))
