"""Keys and values that kernels write to a pool in FP8 on their way to attention: what a pool of the model's dtype would hold,
rounded. And rows that share a prefix, whose pieces are merged."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcache.layout import FP8, BlockLayout, KVScales
from kvcache.pool import KVPool
from tests.workers.attention.attention_reference import make_step
from tests.workers.attention.fp8_reference import SCALES, codes_of, narrow_problem
from tests.workers.kernels.attention.test_decode import SHORT, tell
from tests.workers.kernels.devices import ATTENTION_TOLERANCE, DEVICES, DTYPES, attention_cases

pytest.importorskip("triton")

from workers.kernels.attention.decode import DecodeAttention
from workers.kernels.attention.decode_config import DecodeConfig
from workers.kernels.rope import qk_norm_rope_write
from workers.kernels.turn import HeadTurn
from workers.model.rotary import Rope, Rotary

BLOCK, LAYER, POSITIONS, KV_HEADS, HEADS, DIM = 16, 1, 256, 2, 4, 64
CONTEXTS = [1, 16, 17, 100, 130, 0, 70]


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
