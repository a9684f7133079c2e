"""Decode attention in Triton against dense float64 attention: every way to cut it, ragged rows, padding, garbage."""

from dataclasses import replace

import pytest
import torch

from kvcache.layout import BlockLayout
from tests.workers.attention.attention_reference import Problem, make_problem, make_step
from tests.workers.kernels.devices import ATTENTION_TOLERANCE, CUDA, every_attention_dtype, one_attention_dtype

pytest.importorskip("triton")

from workers.kernels.decode_attention import DecodeAttention, DecodeConfig


def decode(problem: Problem, config: DecodeConfig | None = None, width: int = 0, padding: int = 0) -> torch.Tensor:
    """Writes the step's own keys and values, then attends; `width` widens the tables, `padding` rows come behind."""
    step, pool, layer = problem.step, problem.pool, problem.layer
    block, slot = step.slots // pool.layout.block_size, step.slots % pool.layout.block_size
    pool.data[block, layer, 0, slot], pool.data[block, layer, 1, slot] = problem.key, problem.value
    rows = len(problem.query) + padding
    tables = torch.zeros((rows, step.block_tables.shape[1] + width), dtype=torch.int32, device=pool.device)
    tables[:, step.block_tables.shape[1] :] = 1 << 30  # no block: must not be followed
    tables[: len(problem.query), : step.block_tables.shape[1]] = step.block_tables
    contexts = torch.zeros(rows, dtype=torch.int32, device=pool.device)
    contexts[: len(problem.query)] = step.context_lens
    query = torch.zeros((rows, *problem.query.shape[1:]), dtype=pool.dtype, device=pool.device)
    query[: len(problem.query)] = problem.query
    attention = DecodeAttention(pool, problem.query.shape[1], rows, config)
    out = torch.full_like(query, float("nan"))
    for _ in range(2):  # what the first left in the buffers must not disturb the second
        attention.plan(contexts, rows)
        attention.run(layer, query, tables, out)
        assert not out.isnan().any()
        result, out = out, torch.full_like(query, float("nan"))
    return result


def check(problem: Problem, result: torch.Tensor) -> None:
    rows = len(problem.query)
    tolerance = ATTENTION_TOLERANCE[problem.pool.layout.dtype]
    torch.testing.assert_close(result[:rows].cpu().double(), problem.expected, atol=tolerance, rtol=0)
    assert not result[rows:].any()


def ragged(block: int, kv_heads: int, group: int, head_dim: int, dtype: str, device: str) -> Problem:
    contexts = [1, block - 1, block, block + 1, 130, 64, 2]
    layout = BlockLayout(block_size=block, layers=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    return make_problem(make_step([1] * len(contexts), contexts, block), layout, heads=kv_heads * group, device=device)


@every_attention_dtype
@pytest.mark.parametrize("block", [16, 64, 256])
def test_ragged_rows_over_block_borders(dtype: str, device: str, block: int) -> None:
    problem = ragged(block, 2, 2, 64, dtype, device)
    check(problem, decode(problem))


@one_attention_dtype
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 128), (4, 96), (7, 128), (8, 64)])
def test_heads(dtype: str, device: str, group: int, head_dim: int) -> None:
    problem = ragged(64, 1 if group > 4 else 2, group, head_dim, dtype, device)
    check(problem, decode(problem))


SHORT = DecodeConfig(keys=16, least=1)  # so that rows of a few hundred tokens are cut


@one_attention_dtype
@pytest.mark.parametrize(
    "config",
    [
        SHORT,
        replace(SHORT, atomic=False),
        replace(SHORT, peeled=True),
        replace(SHORT, transposed=True),
        replace(SHORT, transposed=True, peeled=True, descriptor=True),
        replace(SHORT, peeled=True, descriptor=True, atomic=False),
        replace(SHORT, keys=32, shares=32),
        replace(SHORT, shares=1),
    ],
    ids=str,
)
def test_every_way_to_cut_and_compute(dtype: str, device: str, config: DecodeConfig) -> None:
    for block in (16, 64) if CUDA else (16 if config.keys > SHORT.keys else 64,):
        problem = ragged(block, 1, 3, 64, dtype, device)
        check(problem, decode(problem, config, width=5, padding=4))


@one_attention_dtype
def test_one_long_row_beside_short_ones_and_padding(dtype: str, device: str) -> None:
    layout = BlockLayout(block_size=64, layers=1, kv_heads=2, head_dim=64, dtype=dtype)
    problem = make_problem(make_step([1] * 3, [3, 700, 7], 64), layout, heads=4, device=device)
    config = replace(SHORT, keys=32, shares=8)
    check(problem, decode(problem, config, width=1000, padding=66))  # more rows than the plan looks at together
    check(problem, decode(problem, replace(config, atomic=False)))


@one_attention_dtype
def test_only_padding(dtype: str, device: str) -> None:
    problem = ragged(64, 2, 2, 64, dtype, device)
    attention = DecodeAttention(problem.pool, 4, 3)
    contexts, tables = torch.zeros(3, dtype=torch.int32, device=device), torch.zeros((3, 1), dtype=torch.int32, device=device)
    out = torch.full((3, 4, 64), float("nan"), dtype=problem.pool.dtype, device=device)
    attention.plan(contexts, 3)
    attention.run(0, torch.ones_like(out), tables, out)
    assert not out.any()


@one_attention_dtype
def test_a_row_keeps_its_bits_whatever_runs_beside_it(dtype: str, device: str) -> None:
    """Cut alike, a row gives the same bits: its pieces are merged in order, not as they end."""
    problem = ragged(64, 2 if CUDA else 1, 2, 64, dtype, device)
    config = replace(SHORT, shares=16)
    first = decode(problem, config)
    for _ in range(2 if CUDA else 1):
        assert torch.equal(decode(problem, config), first)
    by_kernel = decode(problem, replace(config, atomic=False))
    torch.testing.assert_close(by_kernel, first, atol=2e-3, rtol=0)


def test_more_rows_than_the_buffers_hold_is_refused() -> None:
    problem = ragged(64, 2, 2, 64, "float16", "cuda" if CUDA else "cpu")
    attention = DecodeAttention(problem.pool, 4, 4)
    with pytest.raises(ValueError, match="reserve 7"):
        attention.plan(problem.step.context_lens, 7)
    small = attention.memory_bytes
    attention.reserve(7)
    assert attention.memory_bytes > small
    attention.plan(problem.step.context_lens, 7)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "kernel"])
def test_a_captured_step_follows_its_contexts_cuda(atomic: bool) -> None:
    layout = BlockLayout(block_size=64, layers=1, kv_heads=2, head_dim=64, dtype="float16")
    contexts = [700, 64, 3]
    problem = make_problem(make_step([1] * 3, contexts, 64), layout, heads=4, device="cuda")
    check(problem, decode(problem))
    attention = DecodeAttention(problem.pool, 4, 3, replace(SHORT, atomic=atomic))
    lens = torch.ones(3, dtype=torch.int32, device="cuda")
    out = torch.zeros_like(problem.query)

    def run() -> None:
        attention.plan(lens, 3)
        attention.run(0, problem.query, problem.step.block_tables, out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    lens.copy_(torch.tensor(contexts))
    graph.replay()
    check(problem, out)
