"""Norms of queries and keys, rotation and KV write against the model's own layers; the rest of the pool stays as it was."""

import pytest
import torch
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.kernels.devices import DEVICES, DTYPES, apart, close, exact_norm, poisoned
from workers.kernels.heads.rope import qk_norm_rope_write
from workers.kernels.heads.turn import HeadTurn
from workers.model.config.rope import Rope
from workers.model.layers.rotary import Rotary, Turns

EPS, LAYER, BLOCKS, BLOCK, POSITIONS = 1e-6, 1, 5, 16, 200
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _expected(heads: Tensor, weight: Tensor | None, rotary: Rotary, positions: Tensor) -> Tensor:
    """In float64, from what the inputs and the table hold after rounding."""
    wide = heads.double() if weight is None else exact_norm(heads, weight, EPS)
    turns = rotary.at(positions.long())
    return rotary.turn(wide, Turns(turns.cos.double(), turns.sin.double()))


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "norm", "ids"),
    [
        (1, 4, 2, 64, True, torch.int64),
        (3, 3, 1, 80, True, torch.int32),
        (3, 2, 2, 128, False, torch.int64),
        (17, 5, 1, 64, True, torch.int64),
        (17, 7, 1, 80, False, torch.int32),
        (17, 2, 2, 6, True, torch.int64),
    ],
)
def test_equals_the_layers(
    device: str, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, norm: bool, ids: torch.dtype
) -> None:
    pool = KVPool(BlockLayout(BLOCK, 3, kv_heads, dim, NAMES[dtype]), BLOCKS, device)
    pool.data.copy_(torch.randn(pool.data.shape))
    before = pool.data.clone()
    rotary = Rotary(Rope(theta=1e4), dim, POSITIONS, dtype, torch.device(device))
    qkv = apart(3 * torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device).to(dtype))
    q_weight, k_weight = (torch.randn(dim, device=device).to(dtype) if norm else None for _ in range(2))
    positions = torch.randint(POSITIONS, (tokens,), device=device).to(ids)
    slots = torch.randperm(BLOCKS * BLOCK, device=device)[:tokens].to(ids)
    out = poisoned(tokens, heads, dim, dtype=dtype, device=device)
    keys, values = pool.keys(LAYER), pool.values(LAYER)
    returned = qk_norm_rope_write(
        qkv, HeadTurn(q_weight, k_weight, EPS, rotary.table), positions, slots, keys, values, heads, kv_heads, out
    )
    assert returned is out

    query, key, value = qkv.view(tokens, -1, dim).split_with_sizes((heads, kv_heads, kv_heads), 1)
    block, slot = slots.long() // BLOCK, slots.long() % BLOCK
    close(out, _expected(query, q_weight, rotary, positions), dtype)
    close(keys[block, slot], _expected(key, k_weight, rotary, positions), dtype)
    assert torch.equal(values[block, slot], value)
    pool.data[block, LAYER, :, slot] = before[block, LAYER, :, slot]
    assert torch.equal(pool.data, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_stays_that_a_probability_of_zero_would_not_make_nought(device: str, dtype: torch.dtype) -> None:
    """Whoever has the block next may read it so; keys, whose scores are replaced where they are not seen, stay NaN."""
    dim, largest = 64, torch.finfo(dtype).max
    pool = KVPool(BlockLayout(BLOCK, 3, 1, dim, NAMES[dtype]), BLOCKS, device)
    pool.data.zero_()
    rotary = Rotary(Rope(theta=1e4), dim, POSITIONS, dtype, torch.device(device))
    qkv = torch.full((2, 3 * dim), torch.nan, device=device).to(dtype)
    given = [torch.inf, -torch.inf, largest, -largest, 0.0, -1.5, torch.nan]
    qkv[1, 2 * dim : 2 * dim + len(given)] = torch.tensor(given, device=device).to(dtype)
    slots = torch.tensor([3, BLOCK + 1], device=device)
    keys, values = pool.keys(LAYER), pool.values(LAYER)
    qk_norm_rope_write(
        qkv, HeadTurn(None, None, EPS, rotary.table), slots, slots, keys, values, 1, 1,
        poisoned(2, 1, dim, dtype=dtype, device=device),
    )  # fmt: skip
    expected = torch.zeros(2, dim)
    expected[1, : len(given)] = torch.tensor([largest, -largest, largest, -largest, 0.0, -1.5, 0.0])
    assert torch.equal(values[slots // BLOCK, slots % BLOCK, 0].float().cpu(), expected)
    assert keys[slots // BLOCK, slots % BLOCK].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_slots_beyond_two_to_the_31_numbers_in(device: str) -> None:
    """A pool's stride times a block number needs 64 bits. Blocks here share memory, so that the test needs little of it."""
    dim, block = 2, 3
    memory = torch.zeros(4 * BLOCK * dim, device=device)
    keys = memory.as_strided((2**30, BLOCK, 1, dim), (0, dim, dim, 1))
    out = poisoned(1, 1, dim, dtype=torch.float32, device=device)
    rotary = Rotary(Rope(theta=1e4), dim, 4, torch.float32, torch.device(device))
    slots = torch.tensor([(2**30 - 1) * BLOCK + block], device=device)
    qkv = torch.randn(1, 3 * dim, device=device)
    qk_norm_rope_write(
        qkv, HeadTurn(None, None, EPS, rotary.table), torch.zeros(1, dtype=torch.int64, device=device), slots, keys, keys, 1, 1,
        out,
    )  # fmt: skip
    assert memory.count_nonzero() == dim
