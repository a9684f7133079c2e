"""Low-rank products of many adapters, against float64: rows of several, of one, and of none in one step."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import DEVICES, TOLERANCE, gpu
from workers.kernels.lora.products import add_low_rank
from workers.kernels.lora.rows import group

NOBODY = -1
MIXES = [
    [NOBODY], [1], [0, NOBODY, 2, 2, 0, NOBODY, 1], [NOBODY] * 5, [2] * 17 + [NOBODY] * 3 + [0] * 18, [1, NOBODY] * 20,
]  # fmt: skip
SHAPES = [(16, 40, (24,)), (16, 1100, (80, 24, 24)), (64, 96, (130, 130)), (128, 64, (72,))]
"""Rank, numbers of x, those of each part of the product: also such as no tile divides, and such as are split among programs."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [*MIXES, [0, 3, NOBODY] * 500])
def test_rows_are_grouped_by_their_adapter(device: str, slots: list[int]) -> None:
    grouped = group(torch.tensor(slots, dtype=torch.int32, device=device), 4)
    expected = [[row for row, own in enumerate(slots) if own == slot] for slot in range(4)]
    starts = grouped.starts.tolist()
    assert [grouped.order[begin:end].tolist() for begin, end in pairwise(starts)] == expected


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rank", "width", "parts"), SHAPES)
@pytest.mark.parametrize("slots", MIXES)
def test_low_rank_products(device: str, rank: int, width: int, parts: tuple[int, ...], slots: list[int]) -> None:
    require_exact(torch.float32, device, rank, width, parts, slots)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize("device", DEVICES)
def test_low_rank_products_of_16_bits(device: str, dtype: torch.dtype) -> None:
    require_exact(dtype, device, *SHAPES[1], MIXES[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [200, 300])
def test_low_rank_products_of_many_rows(device: str, rows: int) -> None:
    require_exact(torch.float32, device, 16, 70, (40, 20), [(row * row) % 5 - 1 for row in range(rows)])


def require_exact(
    dtype: torch.dtype, device: str, rank: int, width: int, parts: tuple[int, ...], slots: list[int]
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(len(slots) + rank)
    count, out = max(4, max(slots) + 1), sum(parts)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, product = numbers(len(slots) + 2, width + 8)[:, :width], numbers(len(slots) + 2, out + 8)[:, :out]
    a, b = numbers(count, len(parts) * rank, width) * width**-0.5, numbers(count, out, rank) * rank**-0.5
    exact, kept = product.double(), product.clone()
    for row, slot in enumerate(slots):
        if slot != NOBODY:
            low = (a[slot].double() @ x[row].double()).view(len(parts), rank)
            exact[row] += torch.cat([w @ v for w, v in zip(b[slot].double().split(parts), low, strict=True)])
    add_low_rank(product, x, a, b, parts, group(torch.tensor(slots, dtype=torch.int32, device=device), count))
    none = [*(row for row, slot in enumerate(slots) if slot == NOBODY), len(slots), len(slots) + 1]
    assert torch.equal(product[none], kept[none]), "rows without an adapter, and padding, stay as they are"
    assert float((product.double() - exact).norm() / exact.norm()) < TOLERANCE[dtype]
