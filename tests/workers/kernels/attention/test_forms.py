"""Decodes and chunks by every form against dense float64 attention: what a layer does not see has no block, and the first block
that it sees holds NaN before its window."""

from dataclasses import replace

import pytest
import torch

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.attention.attention_reference import Problem, lowest_seen, make_problem, make_step
from tests.workers.kernels.attention.test_decode import tell
from tests.workers.kernels.devices import ATTENTION_TOLERANCE, CUDA, attention_cases, one_attention_dtype

pytest.importorskip("triton")

from workers.kernels.attention.chunks import ChunkAttention, ChunkConfig
from workers.kernels.attention.decode import DecodeAttention
from workers.kernels.attention.decode_config import DecodeConfig
from workers.kernels.attention.form import Form
from workers.kernels.attention.prefixes import NOT_SHARED, SharedPrefixes

PLAIN = 32**-0.5
FORMS = {
    "scaled": Form(0.7),
    "window-within-a-block": Form(PLAIN, window=5),
    "window-over-blocks": Form(PLAIN, window=75),
    "window-of-one": Form(PLAIN, window=1),
    "window-beyond-all": Form(PLAIN, window=1000),
    "chunk": Form(PLAIN, chunk=48),
    "cap": Form(PLAIN, softcap=1.5),
    "sinks": Form(PLAIN, sinks=True),
    "all": Form(0.3, window=40, chunk=64, softcap=2.0, sinks=True),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
dtype_and_device = pytest.mark.parametrize(("dtype", "device"), [*attention_cases("float32"), *attention_cases("bfloat16")])
SHORT = DecodeConfig(keys=32, least=1, stages=2)  # spans of two small blocks, or of half a large one; rows in several pieces
TILES = ChunkConfig(rows=32, keys=32, stages=2, shares=0)
PIECES = ChunkConfig(rows=32, keys=16, stages=2, shares=20, least=1)
BLOCKS = (16, 64)


def write(problem: Problem) -> None:
    step, pool, layer = problem.step, problem.pool, problem.layer
    block, slot = step.slots // pool.layout.block_size, step.slots % pool.layout.block_size
    pool.data[block, layer, 0, slot], pool.data[block, layer, 1, slot] = problem.key, problem.value


def decode(problem: Problem, config: DecodeConfig, shared: SharedPrefixes | None = None) -> torch.Tensor:
    """With two rows of padding behind."""
    write(problem)
    step, rows = problem.step, len(problem.query) + 2
    contexts = torch.nn.functional.pad(step.context_lens, (0, 2))
    tables = torch.nn.functional.pad(step.block_tables, (0, 0, 0, 2))
    query = torch.cat((problem.query, torch.ones_like(problem.query[:2])))
    attention = DecodeAttention(problem.pool, query.shape[1], rows, config, problem.forms)
    out = torch.full_like(query, float("nan"))
    attention.plan(contexts, rows, shared)
    attention.run(problem.layer, query, tables, out, sinks=problem.sinks)
    assert not out[-2:].any()
    return out[:-2]


def check(problem: Problem, out: torch.Tensor) -> None:
    tolerance = ATTENTION_TOLERANCE[problem.pool.layout.dtype]
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=tolerance, rtol=0)


def layout(block: int, dtype: str, kv_heads: int = 1, head_dim: int = 32, layers: int = 2) -> BlockLayout:
    return BlockLayout(block_size=block, layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)


@pytest.mark.few
@dtype_and_device
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "kernel"])
@every_form
def test_decodes(dtype: str, device: str, form: Form, atomic: bool) -> None:
    """A plain layer stands before the one of the form, so two plans are made; each block size with one way to merge."""
    contexts = [1, 15, 16, 17, 130, 64, 203]
    for block in BLOCKS if CUDA else BLOCKS[:1] if atomic else BLOCKS[1:]:
        step = make_step([1] * len(contexts), contexts, block)
        problem = make_problem(step, layout(block, dtype), 2, device, form=form)
        check(problem, decode(problem, replace(SHORT, atomic=atomic)))


@pytest.mark.few
@dtype_and_device
@pytest.mark.parametrize(("block", "config"), [(16, TILES), (64, TILES), (16, PIECES)], ids=["16", "64", "pieces"])
@every_form
def test_chunks(dtype: str, device: str, form: Form, block: int, config: ChunkConfig) -> None:
    """In pieces as they are for the plain layer before the one of the form: of some there is nothing to see."""
    queries, contexts = [1, 3, 50, 34], [1, 66, 50, 200]
    problem = make_problem(make_step(queries, contexts, block), layout(block, dtype), 2, device, form=form)
    write(problem)
    attention = ChunkAttention(problem.pool, 2, config, problem.forms)
    tiles = attention.plan(problem.step.query_starts, problem.step.context_lens, len(problem.query))
    assert (tiles.partials is None) == (config is TILES)
    out = torch.full_like(problem.query, float("nan"))
    attention.run(
        problem.layer, problem.query, problem.step.block_tables, problem.step.context_lens, tiles, out, problem.sinks
    )
    check(problem, out)


@pytest.mark.few
@dtype_and_device
@pytest.mark.parametrize(("name", "layers"), [("cap", 2), ("sinks", 2), ("window-over-blocks", 2), ("window-over-blocks", 1)])
def test_rows_that_share_a_prefix(dtype: str, device: str, name: str, layers: int) -> None:
    """Their sinks count once, whoever merges; a layer with a window reads each row's own keys, whatever the sets say, and where
    there is no other none are wanted."""
    contexts, form = [70, 130, 100, 33], FORMS[name]
    problem = make_problem(make_step([1] * 4, contexts, 16), layout(16, dtype, layers=layers), 4, device, form=form)
    assert (DecodeAttention(problem.pool, 4, 4, SHORT, problem.forms).prefixes == NOT_SHARED) == (layers == 1)
    tables = problem.step.block_tables
    if form.window is None:  # the rows of the set begin with the same blocks; what is expected is what they say alone
        tables[[1, 2], :4] = tables[0, :4].clone()
        expected = decode(problem, SHORT)
    else:
        expected = problem.expected.to(problem.query)
    for atomic in (True, False):
        shared = tell([([0, 1, 2], 64)], 6, device)
        out = decode(problem, replace(SHORT, keys=16, shares=4, atomic=atomic), shared)
        torch.testing.assert_close(out, expected, atol=ATTENTION_TOLERANCE[dtype], rtol=0)


@dtype_and_device
def test_ranks_have_their_own_sinks(dtype: str, device: str) -> None:
    """Of 4 heads and 2 KV heads each of two ranks computes one half, with its part of the sinks."""
    step = make_step([1, 1], [40, 90], 16)
    whole = make_problem(step, layout(16, dtype, kv_heads=2), 4, device, form=FORMS["sinks"])
    check(whole, decode(whole, SHORT))
    for rank in (0, 1):
        part = make_problem(make_step([1, 1], [40, 90], 16), layout(16, dtype), 2, device, form=FORMS["sinks"])
        part.pool.data.copy_(whole.pool.data[..., rank : rank + 1, :])
        heads, kv = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        assert whole.sinks is not None
        shard = replace(
            part, step=whole.step, query=whole.query[:, heads].contiguous(), key=whole.key[:, kv], value=whole.value[:, kv],
            expected=whole.expected[:, heads], sinks=whole.sinks[heads],
        )  # fmt: skip
        check(shard, decode(shard, SHORT))


@dtype_and_device
def test_work_begins_where_the_window_does(dtype: str, device: str) -> None:
    """The plan of a windowed layer has no item for what lies before, and cuts what is left as finely as the device wants."""
    contexts = torch.tensor([500, 7, 0], dtype=torch.int32, device=device)
    form = Form(PLAIN, window=100)
    problem = make_problem(make_step([1], [1], 16), layout(16, dtype), 2, device)
    attention = DecodeAttention(problem.pool, 2, 3, SHORT, [Form(PLAIN), form])
    attention.plan(contexts, 3)
    read = {}
    for reach, work in attention._work.items():
        items = [item for item in work.items.tolist() if item[2] < item[3]]
        read[reach] = [sorted((low, high) for row, _, low, high, *_ in items if row == wanted) for wanted in range(3)]
    plain, windowed = read[Form(PLAIN).reach], read[form.reach]
    assert (plain[0][0][0], plain[0][-1][1]) == (0, 16)
    assert lowest_seen(form, 499) == 400
    assert (windowed[0][0][0], windowed[0][-1][1]) == (400 // SHORT.keys, 16)
    assert len(windowed[0]) > 1
    assert windowed[1:] == plain[1:] == [[(0, 1)], [(0, 1)]]


@one_attention_dtype
@pytest.mark.parametrize("head_dim", [80, 192, 256, 512])
def test_wide_heads(dtype: str, device: str, head_dim: int) -> None:
    """By the configurations that are chosen for them."""
    queries, contexts = [1, 1, 20], [3, 70, 40]
    for first, last in ((0, 2), (2, 3)):
        step = make_step(queries[first:last], contexts[first:last], 16)
        problem = make_problem(step, layout(16, dtype, head_dim=head_dim, layers=1), 2, device)
        if first == 0:
            attention = DecodeAttention(problem.pool, 2, 4)
            check(problem, decode(problem, attention.config))
            continue
        write(problem)
        chunks, out = ChunkAttention(problem.pool, 2), torch.full_like(problem.query, float("nan"))
        tiles = chunks.plan(step.query_starts.to(device), step.context_lens.to(device), len(problem.query))
        chunks.run(0, problem.query, problem.step.block_tables, problem.step.context_lens, tiles, out)
        check(problem, out)


@dtype_and_device
def test_heads_that_fill_a_part_of_the_pools_rows(dtype: str, device: str) -> None:
    """Two KV heads of 32 in a pool of one of 96: as in a pool of their own; what stands behind them is NaN."""
    form = FORMS["window-over-blocks"]
    decodes = make_problem(make_step([1, 1], [40, 90], 16), layout(16, dtype, kv_heads=2), 4, device, form=form)
    chunks = make_problem(make_step([30, 3], [130, 3], 16), layout(16, dtype, kv_heads=2), 4, device, form=form)
    for problem in (decodes, chunks):
        write(problem)
        pool = KVPool(layout(16, dtype, head_dim=96), problem.pool.blocks, device)
        pool.data.fill_(float("nan"))
        pool.data.flatten(4)[..., :64] = problem.pool.data.flatten(4)
        step, out = problem.step, torch.full_like(problem.query, float("nan"))
        if problem is decodes:
            decode_attention = DecodeAttention(pool, 4, 2, SHORT, problem.forms, 2, 32)
            decode_attention.plan(step.context_lens, 2)
            decode_attention.run(1, problem.query, step.block_tables, out)
        else:
            chunk_attention = ChunkAttention(pool, 4, TILES, problem.forms, 2, 32)
            tiles = chunk_attention.plan(step.query_starts, step.context_lens, len(problem.query))
            chunk_attention.run(1, problem.query, step.block_tables, step.context_lens, tiles, out)
        check(problem, out)
