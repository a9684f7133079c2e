"""Keys and values that kernels write to a pool in FP8 on their way to attention: what a pool of the model's dtype would hold,
rounded. And rows that share a prefix, whose pieces are merged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcache.layout import FP8, BlockLayout, KVScales
from kvcache.pool import KVPool
from tests.workers.attention.attention_reference import make_step
from tests.workers.attention.fp8_reference import NAN, SCALES, codes_of, meaning, narrow_problem
from tests.workers.kernels.attention.test_decode import SHORT, tell
from tests.workers.kernels.attention.test_forms import FORMS, TILES
from tests.workers.kernels.devices import ATTENTION_TOLERANCE, CUDA, DEVICES, DTYPES, attention_cases

pytest.importorskip("triton")

import triton
import triton.language as tl

from workers.kernels.attention.chunks import ChunkAttention
from workers.kernels.attention.decode import DecodeAttention
from workers.kernels.attention.decode_config import DecodeConfig
from workers.kernels.attention.form import Form, plain_forms
from workers.kernels.heads.fp8 import query_for_fp8, widened
from workers.kernels.heads.rope import qk_norm_rope_write
from workers.kernels.heads.turn import HeadTurn
from workers.model.config.rope import Rope
from workers.model.layers.rotary import Rotary

BLOCK, LAYER, POSITIONS, KV_HEADS, HEADS, DIM = 16, 1, 256, 2, 4, 64
CONTEXTS = [1, 16, 17, 100, 130, 0, 70]
IN_FLOAT16 = attention_cases("float16", "bfloat16")
"""Whose products with FP8 are in float16: those of bfloat16 too are interpreted on a CPU."""
if not CUDA:
    IN_FLOAT16.append(pytest.param("bfloat16", "cpu", id="bfloat16"))


def pools(dtype: torch.dtype, blocks: int, device: str) -> tuple[KVPool, KVPool]:
    """In the model's dtype and in FP8, both of zeros."""
    scales = KVScales((1.0, SCALES[0]), (1.0, SCALES[1]))
    plain = BlockLayout(BLOCK, 2, KV_HEADS, DIM, str(dtype).removeprefix("torch."))
    wide, narrow = KVPool(plain, blocks, device), KVPool(replace(plain, dtype=FP8), blocks, device, scales=scales)
    wide.data.zero_()
    narrow.data.zero_()
    return wide, narrow


def require_rounded(narrow: KVPool, wide: KVPool) -> None:
    """Of the layer both halves, and nothing else."""
    expected = torch.zeros(narrow.data.shape, dtype=torch.uint8)
    for half, scale in enumerate(SCALES):
        expected[:, LAYER, half] = codes_of(wide.data[:, LAYER, half].cpu(), scale)
    assert expected[:, LAYER].any()
    assert torch.equal(narrow.data.view(torch.uint8).cpu(), expected)


def turn_of(dtype: torch.dtype, device: str, norm: bool) -> HeadTurn:
    rotary = Rotary(Rope(theta=1e4), DIM, POSITIONS, dtype, torch.device(device))
    q_weight, k_weight = (torch.randn(DIM, device=device).to(dtype) if norm else None for _ in range(2))
    return HeadTurn(q_weight, k_weight, 1e-6, rotary.table)


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "norm"), [(3, True), (17, False)])
def test_norms_rotation_and_write(device: str, dtype: torch.dtype, tokens: int, norm: bool) -> None:
    wide, narrow = pools(dtype, 5, device)
    qkv = 40 * torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, device=device).to(dtype)  # some of it beyond 448
    turn = turn_of(dtype, device, norm)
    positions = torch.randint(POSITIONS, (tokens,), device=device)
    slots = torch.randperm(5 * BLOCK, device=device)[:tokens]
    queries = []
    for pool in (wide, narrow):
        out = torch.empty(tokens, HEADS, DIM, dtype=dtype, device=device)
        queries.append(out)
        qk_norm_rope_write(
            qkv, turn, positions, slots, pool.keys(LAYER), pool.values(LAYER), HEADS, KV_HEADS, out, scales=pool.scales(LAYER)
        )
    assert torch.equal(*queries)
    require_rounded(narrow, wide)


@pytest.mark.few
@pytest.mark.parametrize(("dtype", "device"), attention_cases("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("config", [SHORT, replace(SHORT, atomic=False), None], ids=["cut", "apart", "default"])
def test_decodes_that_take_the_projection(dtype: str, device: str, norm: bool, config: DecodeConfig | None) -> None:
    """They write what others find there, and attend to it as it then is: as where it was written by a launch of its own."""
    kind = getattr(torch, dtype)
    rows, width = len(CONTEXTS), -(-max(CONTEXTS) // BLOCK)
    wide, narrow = pools(kind, rows * width, device)
    _, before = pools(kind, rows * width, device)
    projected = torch.randn(rows, (HEADS + 2 * KV_HEADS) * DIM, device=device).to(kind)
    tables = torch.randperm(rows * width).view(rows, width).int().to(device)
    contexts = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    turn = turn_of(kind, device, norm)
    attended(wide, projected, tables, contexts, turn, config)
    outs = [attended(narrow, projected, tables, contexts, turn, config)]
    require_rounded(narrow, wide)

    live = contexts > 0
    positions = (contexts - 1)[live]
    slots = tables[live].gather(1, (positions // BLOCK)[:, None].long())[:, 0] * BLOCK + positions % BLOCK
    query = torch.zeros(rows, HEADS, DIM, dtype=kind, device=device)
    query[live] = qk_norm_rope_write(
        projected[live], turn, positions, slots, before.keys(LAYER), before.values(LAYER), HEADS, KV_HEADS,
        torch.empty_like(query[live]), scales=before.scales(LAYER),
    )  # fmt: skip
    outs.append(attended(before, query, tables, contexts, None, config))
    tolerance = ATTENTION_TOLERANCE[dtype]
    torch.testing.assert_close(*outs, atol=tolerance, rtol=tolerance)
    assert not outs[0][~live].any()


def attended(
    pool: KVPool, query: Tensor, tables: Tensor, contexts: Tensor, turn: HeadTurn | None, config: DecodeConfig | None
) -> Tensor:
    attention = DecodeAttention(pool, HEADS, len(query), config, dtype=query.dtype)
    out = torch.full((len(query), HEADS, DIM), torch.nan, dtype=query.dtype, device=query.device)
    attention.plan(contexts, len(query))
    attention.run(LAYER, query, tables, out, turn)
    return out


@pytest.mark.parametrize(("dtype", "device"), attention_cases("float32", "bfloat16"))
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "kernel"])
def test_rows_that_share_a_prefix(dtype: str, device: str, atomic: bool) -> None:
    """Scaled once, whether a row's values come from one piece, or from its set's and its own."""
    kind = getattr(torch, dtype)
    layout = BlockLayout(block_size=BLOCK, layers=2, kv_heads=KV_HEADS, head_dim=32, dtype=FP8)
    contexts = [70, 33, 130, 49]
    problem = narrow_problem(make_step([1] * 4, contexts, BLOCK), layout, HEADS, kind, device)
    problem.pool.data.view(torch.uint8).copy_(problem.codes)
    problem.step.block_tables[3, :3] = problem.step.block_tables[0, :3].clone()
    attention = DecodeAttention(problem.pool, HEADS, 4, replace(SHORT, atomic=atomic), dtype=kind)
    outs = []
    for shared in (None, tell([([0, 3], 48)], 4, device)):
        outs.append(torch.full_like(problem.query, float("nan")))
        attention.plan(problem.step.context_lens, 4, shared)
        attention.run(LAYER, problem.query, problem.step.block_tables, outs[-1])
    tolerance = 5 * ATTENTION_TOLERANCE[dtype]
    torch.testing.assert_close(outs[1], outs[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(outs[1][:3].cpu().double(), problem.expected[:3], atol=tolerance, rtol=0)


# ---- products in float16


@triton.jit
def _widen(pairs, first, second, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    even, odd = widened(tl.load(pairs + at))
    tl.store(first + at, even)
    tl.store(second + at, odd)


@pytest.mark.parametrize("device", DEVICES)
def test_every_pair_of_numbers_is_widened_exactly(device: str) -> None:
    codes = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).to(device)
    outs = torch.zeros(2, 1 << 16, dtype=torch.float16, device=device)
    for start in range(0, 1 << 16, 1 << 12):
        part = slice(start, start + (1 << 12))
        _widen[(1,)](codes[part], outs[0, part], outs[1, part], COUNT=1 << 12)
    each = torch.arange(1 << 16)
    for out, half in zip(outs.cpu(), (each % 256, each // 256), strict=True):
        is_nan = half % 128 == NAN
        assert out[is_nan].isnan().all()
        numbers = half[~is_nan]
        assert torch.equal(out[~is_nan].double(), meaning(numbers, 1.0))


@triton.jit
def _narrow(queries, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, query_for_fp8(tl.load(queries + at)))


@pytest.mark.parametrize("device", DEVICES)
def test_queries_of_bfloat16_in_float16(device: str) -> None:
    """Exact between float16's smallest normal number and its largest, and that beyond it; NaN stays NaN."""
    magnitudes = [0.0, 2.0**-14, 1.0078125, 65280.0, 65536.0, 3e38, torch.inf, torch.nan]
    queries = torch.tensor([*magnitudes, *(-number for number in magnitudes)], dtype=torch.bfloat16, device=device)
    out = torch.zeros(16, dtype=torch.float16, device=device)
    _narrow[(1,)](queries, out, COUNT=16)
    assert torch.equal(out.isnan(), queries.isnan())
    expected = queries.double().clamp(-65504, 65504)
    assert torch.equal(out.double().nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize(("dtype", "device"), IN_FLOAT16)
@pytest.mark.parametrize("asked", [2.0**-20, 1e4])
def test_queries_near_the_limits_of_float16(dtype: str, device: str, asked: float) -> None:
    """Tiny ones see all keys alike, huge ones the key of the greatest score."""
    layout = BlockLayout(block_size=BLOCK, layers=2, kv_heads=KV_HEADS, head_dim=DIM, dtype=FP8)
    kind, steps = getattr(torch, dtype), make_step([1] * 3, [1, 33, 70], BLOCK)
    problem = narrow_problem(steps, layout, HEADS, kind, device, asked=asked)
    problem.pool.data.view(torch.uint8).copy_(problem.codes)
    attention = DecodeAttention(problem.pool, HEADS, 3, SHORT, dtype=kind)
    out = torch.full_like(problem.query, torch.nan)
    attention.plan(problem.step.context_lens, 3)
    attention.run(LAYER, problem.query, problem.step.block_tables, out)
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=6 * ATTENTION_TOLERANCE[dtype], rtol=0)


@pytest.mark.few
@pytest.mark.parametrize(("dtype", "device"), IN_FLOAT16)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("head_dim", [16, 48])
def test_every_form(dtype: str, device: str, form: Form, head_dim: int) -> None:
    """Decodes cut into pieces, and chunks."""
    layout = BlockLayout(block_size=BLOCK, layers=2, kv_heads=KV_HEADS, head_dim=head_dim, dtype=FP8)
    kind, queries = getattr(torch, dtype), [1, 1, 1, 30]
    sinks = torch.randn(HEADS).to(kind) if form.sinks else None
    problem = narrow_problem(make_step(queries, [3, 130, 64, 70], BLOCK), layout, HEADS, kind, device, form=form, sinks=sinks)
    problem.pool.data.view(torch.uint8).copy_(problem.codes)
    forms, told = [*plain_forms(1, head_dim), form], None if sinks is None else sinks.to(device)
    step, query, out = problem.step, problem.query, torch.full_like(problem.query, torch.nan)
    decode = DecodeAttention(problem.pool, HEADS, 3, SHORT, forms, dtype=kind)
    decode.plan(step.context_lens, 3)
    decode.run(LAYER, query[:3], step.block_tables[:3], out[:3], sinks=told)
    chunks = ChunkAttention(problem.pool, HEADS, TILES, forms, dtype=kind)
    contexts = step.context_lens[3:]
    tiles = chunks.plan(step.query_starts[3:] - 3, contexts, 30)
    chunks.run(LAYER, query[3:], step.block_tables[3:], contexts, tiles, out[3:], told)
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=6 * ATTENTION_TOLERANCE[dtype], rtol=0)
