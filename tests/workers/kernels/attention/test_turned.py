"""Decodes that take the projection as it is, against norms, rotation and KV write in a launch of their own before them."""

from dataclasses import replace

import pytest
import torch

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.kernels.devices import attention_cases

pytest.importorskip("triton")

from workers.kernels.attention.decode import DecodeAttention
from workers.kernels.attention.decode_config import DecodeConfig
from workers.kernels.attention.prefixes import SharedPrefixes
from workers.kernels.heads.rope import qk_norm_rope_write
from workers.kernels.heads.turn import HeadTurn
from workers.model.config.rope import Rope
from workers.model.layers.rotary import Rotary

BLOCK, LAYER, POSITIONS = 16, 1, 256
CONTEXTS = [1, 16, 17, 100, 64, 130, 0, 70]
SHARED = {3: 64, 5: 64, 7: 64}
"""Rows whose first blocks are the same, and how many tokens are in them."""
SHORT = DecodeConfig(keys=16, least=1)


def _sets(device: str) -> SharedPrefixes:
    tokens = torch.zeros(len(CONTEXTS), dtype=torch.int32, device=device)
    tokens[list(SHARED)] = torch.tensor(list(SHARED.values()), dtype=torch.int32, device=device)
    sets = torch.zeros(3 * 8, dtype=torch.int32, device=device)
    sets[:3] = torch.tensor([0, len(SHARED), 64])
    members = torch.zeros(len(CONTEXTS), dtype=torch.int32, device=device)
    members[: len(SHARED)] = torch.tensor(list(SHARED))
    return SharedPrefixes(tokens, sets, members)


@pytest.mark.few
@pytest.mark.parametrize(("dtype", "device"), attention_cases("float32", "bfloat16"))
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "norm"), [(4, 2, 64, True), (3, 1, 24, False), (2, 2, 128, True)])
@pytest.mark.parametrize("config", [SHORT, replace(SHORT, atomic=False), DecodeConfig()], ids=["cut", "apart", "default"])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_a_launch_of_its_own(
    dtype: str, device: str, heads: int, kv_heads: int, dim: int, norm: bool, config: DecodeConfig, shared: bool
) -> None:
    torch.manual_seed(7)
    kind = getattr(torch, dtype)
    rows, width = len(CONTEXTS), -(-max(CONTEXTS) // BLOCK)
    tables = torch.randperm(rows * width)[: rows * width].view(rows, width).int()
    for row in SHARED:
        tables[row, :4] = tables[3, :4]
    pools = [KVPool(BlockLayout(BLOCK, 2, kv_heads, dim, dtype), rows * width, device) for _ in range(2)]
    pools[0].data.copy_(torch.randn(pools[0].data.shape))
    pools[1].data.copy_(pools[0].data)
    before = pools[0].data.clone()
    rotary = Rotary(Rope(theta=1e4), dim, POSITIONS, kind, torch.device(device))
    q_weight, k_weight = (torch.randn(dim, device=device).to(kind) if norm else None for _ in range(2))
    turn = HeadTurn(q_weight, k_weight, 1e-6, rotary.table)
    projected = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=device).to(kind)
    contexts = torch.tensor(CONTEXTS, dtype=torch.int32)
    live = contexts > 0
    positions = (contexts - 1).clamp(min=0)
    slots = (tables.gather(1, (positions // BLOCK)[:, None].long())[:, 0] * BLOCK + positions % BLOCK).to(device)
    tables, contexts, positions = tables.to(device), contexts.to(device), positions.to(device)

    query = torch.empty(rows, heads, dim, dtype=kind, device=device)
    written = live.nonzero()[:, 0].to(device)
    query[written] = qk_norm_rope_write(
        projected[written], turn, positions[written], slots[written], pools[0].keys(LAYER), pools[0].values(LAYER), heads,
        kv_heads, torch.empty(len(written), heads, dim, dtype=kind, device=device),
    )  # fmt: skip
    query[~live] = 0
    outs = []
    for pool, asked in ((pools[0], query), (pools[1], projected)):
        attention = DecodeAttention(pool, heads, rows, config)
        attention.plan(contexts, rows, _sets(device) if shared and attention.prefixes.rows >= len(SHARED) else None)
        outs.append(torch.full((rows, heads, dim), torch.nan, dtype=kind, device=device))
        attention.run(LAYER, asked, tables, outs[-1], turn if pool is pools[1] else None)
    tolerance = 1e-5 if kind == torch.float32 else 2e-2
    torch.testing.assert_close(outs[1], outs[0], atol=tolerance, rtol=tolerance)
    assert not outs[1][~live].any()
    torch.testing.assert_close(pools[1].data, pools[0].data, atol=tolerance, rtol=tolerance)
    changed = (pools[1].data != before).flatten(3).any(-1)  # [blocks, layers, 2, slots]
    assert changed[:, LAYER].sum() == 2 * live.sum()


@pytest.mark.parametrize(("dtype", "device"), attention_cases("float16"))
def test_what_has_run_over_ends_with_its_row(dtype: str, device: str) -> None:
    """Its output is NaN; but of the values that it leaves in its block none stays so, which the next one may read."""
    kind, dim, rows = getattr(torch, dtype), 32, 2
    pool = KVPool(BlockLayout(BLOCK, 2, 1, dim, dtype), rows, device)
    pool.data.zero_()
    rotary = Rotary(Rope(theta=1e4), dim, POSITIONS, kind, torch.device(device))
    projected = torch.ones(rows, 3 * dim, device=device).to(kind)
    projected[1] = torch.nan
    contexts = torch.tensor([3, 3], dtype=torch.int32, device=device)
    attention = DecodeAttention(pool, 1, rows, SHORT)
    attention.plan(contexts, rows)
    out = torch.zeros(rows, 1, dim, dtype=kind, device=device)
    tables = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
    attention.run(LAYER, projected, tables, out, HeadTurn(None, None, 1e-6, rotary.table))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert pool.values(LAYER).isfinite().all()
    assert pool.keys(LAYER)[1, 2].isnan().all()
