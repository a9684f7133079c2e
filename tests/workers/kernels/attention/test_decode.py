"""Decode attention in Triton against dense float64 attention: every way to cut it, ragged rows, padding, garbage."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.attention.attention_reference import Problem, make_problem, make_step
from tests.workers.kernels.devices import ATTENTION_TOLERANCE, CUDA, every_attention_dtype, one_attention_dtype

pytest.importorskip("triton")

from workers.kernels.attention.decode import DecodeAttention
from workers.kernels.attention.decode_config import DecodeConfig
from workers.kernels.attention.form import Reach
from workers.kernels.attention.prefixes import SET_FIELDS, PrefixLimits, SharedPrefixes


def decode(
    problem: Problem, config: DecodeConfig | None = None, width: int = 0, padding: int = 0, shared: SharedPrefixes | None = None
) -> torch.Tensor:
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
        attention.plan(contexts, rows, shared)
        attention.run(layer, query, tables, out)
        assert not out.isnan().any()
        result, out = out, torch.full_like(query, float("nan"))
    return result


def tell(sets: list[tuple[list[int], int]], rows: int, device: str) -> SharedPrefixes:
    """sets: (rows, common tokens)."""
    tokens, members = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    table = torch.zeros((rows, SET_FIELDS), dtype=torch.int32)
    taken = 0
    for number, (of, common) in enumerate(sets):
        tokens[of] = common
        members[taken : taken + len(of)] = torch.tensor(of)
        table[number] = torch.tensor([taken, len(of), common])
        taken += len(of)
    return SharedPrefixes(tokens.to(device), table.flatten().to(device), members.to(device))


def sharing(problem: Problem, rows: int, sets: list[tuple[list[int], int]]) -> SharedPrefixes:
    """The rows of each set begin with the same blocks afterwards."""
    for of, common in sets:
        blocks = common // problem.pool.layout.block_size
        problem.step.block_tables[of, :blocks] = problem.step.block_tables[of[0], :blocks].clone()
    return tell(sets, rows, str(problem.pool.device))


def check(problem: Problem, result: torch.Tensor) -> None:
    rows = len(problem.query)
    tolerance = ATTENTION_TOLERANCE[problem.pool.layout.dtype]
    torch.testing.assert_close(result[:rows].cpu().double(), problem.expected, atol=tolerance, rtol=0)
    assert not result[rows:].any()


def ragged(block: int, kv_heads: int, group: int, head_dim: int, dtype: str, device: str) -> Problem:
    contexts = [1, block - 1, block, block + 1, 130, 64, 2]
    layout = BlockLayout(block_size=block, layers=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    return make_problem(make_step([1] * len(contexts), contexts, block), layout, heads=kv_heads * group, device=device)


@pytest.mark.few
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


@pytest.mark.few(3)
@one_attention_dtype
@pytest.mark.parametrize(
    "config",
    [
        SHORT,
        replace(SHORT, atomic=False),
        replace(SHORT, keys=32, shares=32),
        replace(SHORT, shares=1),
    ],
    ids=str,
)
def test_every_way_to_cut_and_compute(dtype: str, device: str, config: DecodeConfig) -> None:
    for block in (16, 64) if CUDA else (16 if config.keys > SHORT.keys else 64,):
        problem = ragged(block, 1, 3, 64, dtype, device)
        check(problem, decode(problem, config, width=5, padding=4))


@pytest.mark.few(1)
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


@pytest.mark.few
@one_attention_dtype
@pytest.mark.parametrize("group", [2, 4, 7])
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "kernel"])
def test_rows_that_share_a_prefix_read_it_once(dtype: str, device: str, group: int, atomic: bool) -> None:
    """With their sets the same as without, and as the reference, however the common keys and their own are cut."""
    block = 16
    contexts = [70, 33, 130, 49, 97, 1, 64, 300]
    layout = BlockLayout(block_size=block, layers=1, kv_heads=1 if group > 2 else 2, head_dim=32, dtype=dtype)
    step = make_step([1] * len(contexts), contexts, block)
    problem = make_problem(step, layout, heads=layout.kv_heads * group, device=device)
    config = replace(SHORT, shares=4, atomic=atomic)
    most = DecodeAttention(problem.pool, problem.query.shape[1], len(contexts), config).prefixes.rows
    assert most == 16 // group
    sets = [([0, 3], 48), ([2, 4, 7][:most], 96)]
    shared = sharing(problem, len(contexts), sets)
    alone = decode(problem, config)
    together = decode(problem, config, shared=shared)
    tolerance = ATTENTION_TOLERANCE[dtype]
    torch.testing.assert_close(together, alone, atol=tolerance, rtol=0)
    pool = problem.pool
    for row, context in enumerate(contexts):
        blocks = problem.step.block_tables[row, : -(-context // block)].long()
        key, value = (
            view[blocks].flatten(0, 1)[:context].double().repeat_interleave(group, 1)
            for view in (pool.keys(0), pool.values(0))
        )
        scores = torch.einsum("hd,khd->hk", problem.query[row].double(), key) * layout.head_dim**-0.5
        exact = torch.einsum("hk,khd->hd", scores.softmax(-1), value)
        torch.testing.assert_close(together[row].double(), exact, atol=tolerance, rtol=0)


@one_attention_dtype
def test_a_shared_prefix_is_read_where_its_set_says(dtype: str, device: str) -> None:
    """A member's own table is not followed where its set reads for it: there is nothing there."""
    block, contexts = 16, [70, 70, 70]
    layout = BlockLayout(block_size=block, layers=1, kv_heads=2, head_dim=32, dtype=dtype)
    problem = make_problem(make_step([1] * 3, contexts, block), layout, heads=4, device=device)
    shared = sharing(problem, 3, [([1, 0, 2], 64)])
    expected = decode(problem, SHORT, shared=shared)
    problem.step.block_tables[[0, 2], :4] = 1 << 30
    assert torch.equal(decode(problem, SHORT, shared=shared), expected)


def random_sets(chance: np.random.Generator, limits: PrefixLimits, rows: int) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Sets of some of the rows, and a context for each row."""
    contexts = chance.integers(0, 300, rows)
    left, sets = chance.permutation(rows).tolist(), []
    for _ in range(limits.sets(rows)):
        of, left = left[: chance.integers(2, limits.rows + 1)], left[limits.rows :]
        if len(of) > 1:
            common = int(chance.integers(1, 6)) * limits.tokens
            contexts[of] = np.maximum(contexts[of], common + chance.integers(1, 60, len(of)))
            sets.append((of, common))
    return sets, contexts.tolist()


@pytest.mark.parametrize("seed", range(8 if CUDA else 4))
def test_the_plan_covers_every_key_of_every_row_once(seed: int) -> None:
    """Each piece has a place of its own for its result; no item is left from the plan before."""
    chance = np.random.default_rng(seed)
    device, kv_heads, group = "cuda" if CUDA else "cpu", int(chance.integers(1, 3)), int(chance.choice([1, 2, 4, 7]))
    pool = KVPool(BlockLayout(block_size=16, layers=1, kv_heads=kv_heads, head_dim=16, dtype="float32"), 2, device)
    keys, rows = int(chance.choice([16, 32])), int(chance.integers(2, 41))
    config = DecodeConfig(keys=keys, shares=int(chance.integers(1, 9)), least=int(chance.integers(1, 4)))
    attention = DecodeAttention(pool, kv_heads * group, rows + 3, config)
    sets, contexts = random_sets(chance, attention.prefixes, rows)
    shared = tell(sets, rows, device)
    attention._work[Reach()].items.fill_(7)
    attention.plan(torch.tensor(contexts, dtype=torch.int32, device=device), rows, shared)
    row_pieces, row_entries = attention._work[Reach()].pieces.tolist(), attention._work[Reach()].entries.tolist()
    covered: dict[tuple[int, int], list[tuple[int, int]]] = {(row, head): [] for row in range(rows) for head in range(kv_heads)}
    entries: list[int] = []
    items = attention._work[Reach()].items[: attention._programs(rows)]
    for first, packed, low, high, _, pieces, piece, entry in items.tolist():
        count, head = divmod(packed, kv_heads)
        if low >= high:
            continue
        for row in [first] if count == 1 else shared.members[first : first + count].tolist():
            covered[row, head].append((low, high))
            assert pieces == row_pieces[row] or count > 1
            if row_pieces[row] > 1:
                entries.append(entry if count == 1 else row_entries[row] + head * row_pieces[row] + piece)
    for (row, _), spans in covered.items():
        borders = sorted(spans)
        assert [low for low, _ in borders] == [0, *(high for _, high in borders[:-1])]
        assert borders[-1][1] == max(1, -(-contexts[row] // keys))
        assert len(borders) == row_pieces[row]
    assert len(entries) == len(set(entries))
    assert max(entries, default=0) * group < len(attention._lse)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group"), [("float32", 2, 2), ("float32", 2, 1), ("bfloat16", 8, 2), ("bfloat16", 8, 4)]
)
def test_random_sets_say_what_the_rows_say_alone_cuda(dtype: str, kv_heads: int, group: int) -> None:
    chance = np.random.default_rng(0)
    layout = BlockLayout(block_size=64, layers=1, kv_heads=kv_heads, head_dim=64, dtype=dtype)
    for _ in range(100):
        rows = int(chance.integers(9, 60))
        limits = PrefixLimits(16 // group, 64)
        sets, contexts = random_sets(chance, limits, rows)
        contexts = [max(1, context) for context in contexts]
        problem = make_problem(make_step([1] * rows, contexts, 64), layout, heads=kv_heads * group, device="cuda")
        shared = sharing(problem, rows, sets)
        together, alone = (decode(problem, shared=told) for told in (shared, None))
        torch.testing.assert_close(together, alone, atol=ATTENTION_TOLERANCE[dtype], rtol=0)


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
