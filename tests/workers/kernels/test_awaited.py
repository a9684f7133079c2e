"""Kernels that read a product add the part that adapters still owe it, against float64: rows of several, of one, of none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.kernels.devices import DEVICES, apart, close, exact_norm, gpu, poisoned
from workers.kernels.heads.rope import qk_norm_rope_write
from workers.kernels.heads.turn import HeadTurn
from workers.kernels.lora.weights import Awaited
from workers.kernels.rows.activation import silu_mul
from workers.kernels.rows.norm import add_rms_norm
from workers.model.config.rope import Rope
from workers.model.layers.rotary import Rotary, Turns

EPS, BLOCK, POSITIONS, NOBODY = 1e-6, 16, 50, -1
MIXES = [[2], [NOBODY], [1, NOBODY, 0, 0, 2, NOBODY]]
CASES = [
    (torch.float32, 16), (torch.float32, 32), (torch.float16, 16), pytest.param(torch.bfloat16, 16, marks=gpu),
    pytest.param(torch.bfloat16, 32, marks=gpu),
]  # fmt: skip
"""Dtypes and ranks."""

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("slots", MIXES),
    pytest.mark.parametrize(("dtype", "rank"), CASES),
]


class Product:
    """A product of random numbers with its adapters' part still to come, and the float64 of both together. What no row may read
    of low is NaN."""

    def __init__(self, parts: tuple[int, ...], rank: int, slots: list[int], dtype: torch.dtype, device: str) -> None:
        count, out = max(slots) + 2, sum(parts)
        b = (torch.randn(count, out, rank) * rank**-0.5).to(device, dtype)
        low = torch.full((len(slots), count, len(parts), rank), torch.nan, dtype=dtype, device=device)
        self.values = apart(torch.randn(len(slots), out).to(device, dtype))
        self.exact = self.values.double()
        for row, slot in enumerate(slots):
            if slot != NOBODY:
                low[row, slot] = torch.randn(len(parts), rank).to(device, dtype)
                each = zip(b[slot].double().split(parts), low[row, slot].double(), strict=True)
                self.exact[row] += torch.cat([up @ own for up, own in each])
        self.awaited = Awaited(apart(low.flatten(1)), b, torch.tensor(slots, dtype=torch.int32, device=device))


def random(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape).to(like)


@pytest.mark.parametrize("width", [100, 1024])
def test_norm(width: int, dtype: torch.dtype, rank: int, slots: list[int], device: str) -> None:
    product = Product((width,), rank, slots, dtype, device)
    hidden, weight = random(len(slots), width, like=product.values), random(width, like=product.values)
    exact = hidden.double() + product.exact
    normed = add_rms_norm(hidden, product.values, weight, EPS, awaited=product.awaited)
    close(hidden, exact, dtype)
    close(normed, exact_norm(exact, weight, EPS), dtype)


@pytest.mark.parametrize("width", [90, 600])
def test_swiglu(width: int, dtype: torch.dtype, rank: int, slots: list[int], device: str) -> None:
    product = Product((width, width), rank, slots, dtype, device)
    gate, up = product.exact.chunk(2, -1)
    close(silu_mul(product.values, awaited=product.awaited), F.silu(gate) * up, dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "norm"), [(4, 2, 64, True), (5, 1, 20, False)])
def test_heads(
    heads: int, kv_heads: int, dim: int, norm: bool, dtype: torch.dtype, rank: int, slots: list[int], device: str
) -> None:  # fmt: skip
    tokens = len(slots)
    product = Product((heads * dim, kv_heads * dim, kv_heads * dim), rank, slots, dtype, device)
    pool = KVPool(BlockLayout(BLOCK, 1, kv_heads, dim, str(dtype).removeprefix("torch.")), 2, device)
    q_weight, k_weight = (random(dim, like=product.values) if norm else None for _ in range(2))
    positions, at = (torch.randperm(limit, device=device)[:tokens] for limit in (POSITIONS, 2 * BLOCK))
    rotary = Rotary(Rope(theta=1e4), dim, POSITIONS, dtype, torch.device(device))
    keys, values = pool.keys(0), pool.values(0)
    out = qk_norm_rope_write(
        product.values, HeadTurn(q_weight, k_weight, EPS, rotary.table), positions, at, keys, values, heads, kv_heads,
        poisoned(tokens, heads, dim, dtype=dtype, device=device), awaited=product.awaited,
    )  # fmt: skip
    turns = rotary.at(positions)
    wide = Turns(turns.cos.double(), turns.sin.double())

    def turned(states: Tensor, weight: Tensor | None) -> Tensor:
        return rotary.turn(states if weight is None else exact_norm(states, weight, EPS), wide)

    query, key, value = product.exact.view(tokens, -1, dim).split_with_sizes((heads, kv_heads, kv_heads), 1)
    close(out, turned(query, q_weight), dtype)
    close(keys[at // BLOCK, at % BLOCK], turned(key, k_weight), dtype)
    close(values[at // BLOCK, at % BLOCK], value, dtype)
