"""Low-rank products of many adapters, against float64: rows of several, of one, and of none in one step."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import DEVICES, TOLERANCE, close, exact_norm, gpu, rounded
from workers.kernels.lora.few import NOBODYS, FewRows, LowRank, ShrinkTiling, list_slots
from workers.kernels.lora.products import add_low_rank
from workers.kernels.lora.rows import group
from workers.kernels.products.matvec import MAX_TOKENS_OF_WIDE, Tiling, choose_adapted, matvec

NOBODY, EPS = -1, 1e-6
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", MIXES)
def test_slots_of_few_rows_are_listed(device: str, slots: list[int]) -> None:
    few, expected = list_slots(torch.tensor(slots, dtype=torch.int32, device=device), 5), sorted({*slots} - {NOBODY})
    assert few.present.tolist() == [len(expected)]
    assert few.listed.tolist() == expected + [NOBODYS.value] * (8 - len(expected))


@dataclass(frozen=True)
class Around:
    """A product and what is fused with it. out: its numbers, parts: those of each A."""

    out: int
    parts: tuple[int, ...]
    rank: int = 16
    norm: bool = False
    residual: bool = False
    swiglu: bool = False


PRODUCTS = {
    "one part, an edge": Around(24, (24,), residual=True),
    "three parts": Around(64, (32, 16, 16), norm=True),
    "swiglu": Around(24, (24, 24), norm=True, swiglu=True),
    "several turns": Around(32, (32,), 64, residual=True),
    "one adapter a turn": Around(16, (16, 16), 128, norm=True, swiglu=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("slots", MIXES)
def test_products_of_few_tokens_add_the_part_of_their_adapters(
    device: str, dtype: torch.dtype, name: str, parts: int, slots: list[int]
) -> None:
    around, width, tokens = PRODUCTS[name], 128, len(slots)
    generator = torch.Generator().manual_seed(tokens)

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    rows, count = sum(around.parts), 4
    x, norm = numbers(tokens, width + 8)[:, :width], numbers(width) if around.norm else None
    weight, residual = numbers(rows, width, scale=width**-0.5), numbers(tokens, around.out) if around.residual else None
    a = numbers(count, len(around.parts) * around.rank, width, scale=width**-0.5)
    b = numbers(count, rows, around.rank, scale=around.rank**-0.5)
    exact, alone = _exact(around, x, norm, weight, residual, a, b, slots), Tiling(16, 32, 4, 2, parts)
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    low_rank = LowRank(
        a, b, around.parts, list_slots(torch.tensor(slots, dtype=torch.int32, device=device), count),
        ShrinkTiling(16, 32, parts),
    )  # fmt: skip

    def product(low_rank: LowRank | None, residual: Tensor | None) -> Tensor:
        return matvec(
            x, weight, norm_weight=norm, eps=EPS, residual=residual, swiglu=around.swiglu, counters=counters, config=alone,
            low_rank=low_rank, pdl=device == "cuda",
        )  # fmt: skip

    nobody = replace(low_rank, rows=list_slots(torch.full((tokens,), NOBODY, dtype=torch.int32, device=device), count))
    plain = product(nobody, None if residual is None else residual.clone())
    result = product(low_rank, residual)
    close(result, exact, dtype)
    nobodys = [row for row, slot in enumerate(slots) if slot == NOBODY]
    assert torch.equal(result[nobodys], plain[nobodys]), "rows without an adapter are what they are beside none"
    assert not counters.any()


def _exact(
    around: Around, x: Tensor, norm: Tensor | None, weight: Tensor, residual: Tensor | None, a: Tensor, b: Tensor,
    slots: list[int],
) -> Tensor:  # fmt: skip
    """In float64, of the operands as the kernels round them: x times the norm's weight, and what A makes of it. Else SwiGLU of
    few numbers in bfloat16 is 6e-3 off by these roundings alone."""
    wide, scale = x.double(), torch.ones((), dtype=torch.float64, device=x.device)
    if norm is not None and (x.dtype == torch.float16 or len(x) > MAX_TOKENS_OF_WIDE):
        wide = rounded(exact_norm(x, norm, EPS).float(), x.dtype).double()  # a launch before it
    elif norm is not None:
        wide = rounded(x.float() * norm.float(), x.dtype).double()
        scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    product = wide @ weight.double().T
    for row, slot in enumerate(slots):
        if slot != NOBODY:
            low = rounded((a[slot].double() @ wide[row]).float(), x.dtype).double().view(len(around.parts), around.rank)
            of_parts = b[slot].double().split_with_sizes(around.parts)
            product[row] += torch.cat([w @ v for w, v in zip(of_parts, low, strict=True)])
    product *= scale
    if around.swiglu:
        gate, up = product.chunk(2, -1)
        product = torch.nn.functional.silu(gate) * up
    return product if residual is None else product + residual.double()


def test_what_products_with_adapters_are_given() -> None:
    def rows(n: int, k: int, parts: tuple[int, ...], swiglu: bool = False) -> int | None:
        config = choose_adapted(n, k, 32, torch.bfloat16, parts, swiglu)
        return None if config is None else config.rows

    assert all(rows(n, k, parts=parts) for n, k, parts in [(6144, 4096, (4096, 1024, 1024)), (4096, 12288, (4096,))])
    assert rows(12288, 4096, parts=(12288, 12288), swiglu=True)
    assert rows(96, 4096, parts=(48, 24, 24)) is None, "a tile would lie in two parts"
    assert choose_adapted(6144, 4096, 64, torch.bfloat16, (4096, 1024, 1024)) == Tiling(64, 64, 4, 4, 2)
    assert choose_adapted(4096, 12288, 64, torch.bfloat16, (4096,)) == Tiling(64, 128, 4, 4, 2)
    assert choose_adapted(4096, 4096, 1, torch.float32, (4096,)) is None
    nobody = torch.full((1,), NOBODY, dtype=torch.int32)
    low_rank = LowRank(torch.zeros(1, 16, 8), torch.zeros(1, 8, 16), (8,), FewRows(nobody, nobody, nobody))
    with pytest.raises(ValueError, match="choose_adapted"):
        matvec(torch.zeros(1, 8), torch.zeros(8, 8), low_rank=low_rank, config=Tiling(4, 8, 4))


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
