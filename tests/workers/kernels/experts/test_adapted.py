"""Low-rank products of pairs and experts' products with them, against float64: tokens of several adapters and of none."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import CUDA, DEVICES, TOLERANCE, apart
from tests.workers.kernels.experts.mixtures import Weights, exact_route
from workers.kernels.experts.dense import DenseTiling
from workers.kernels.experts.grouped import GroupedTiling, add_up, down, gate_up
from workers.kernels.experts.route import Rule, route
from workers.kernels.lora.experts import low_rank
from workers.kernels.lora.weights import LoraWeights

EXPERTS, TOP, SLOTS, NOBODY = 6, 2, 6, -1
SMALL, WIDE, MANY = GroupedTiling(16, 32, 4, 2), GroupedTiling(32, 256, 4, 2), DenseTiling(32, 32, 4, 3, resident=True)
MIXES = [[NOBODY] * 3, [3], [0, NOBODY, 5, 5, 0, 1, 2, 4, NOBODY, 3, 1, 0, 2]]


def _random(columns: int, rows: tuple[int, ...], rank: int, dtype: torch.dtype, device: str) -> LoraWeights:
    lora = LoraWeights.empty(SLOTS, rank, columns, rows, dtype, torch.device(device), EXPERTS)
    for weight in (lora.a, lora.b):
        weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    return lora


def _merged(weight: Tensor, lora: LoraWeights, slot: int) -> Tensor:
    """The weights of all experts with one adapter's product in it, in float64."""
    if slot == NOBODY:
        return weight.double()
    deltas = []
    for expert in range(EXPERTS):
        parts = [lora.of(expert).part(number, slot) for number in range(len(lora.rows))]
        deltas.append(torch.cat([b.double() @ a.double() for a, b in parts]))
    return weight.double() + torch.stack(deltas)


def _require_exact(
    dtype: torch.dtype, device: str, slots: list[int], size: int, *, rank: int = 16, width: int = 24, hidden: int = 40,
    turns: bool = False, held: slice = slice(0, EXPERTS), tiling: GroupedTiling | DenseTiling = SMALL,
) -> None:  # fmt: skip
    weights = Weights.random(EXPERTS, width, hidden, dtype, device, bias=turns, clamped=turns)
    ups = _random(hidden, (2 * width,) if turns else (width, width), rank, dtype, device)
    downs = _random(width, (hidden,), rank, dtype, device)
    x, scores = apart(torch.randn(len(slots), hidden, device=device).to(dtype)), torch.randn(len(slots), EXPERTS, device=device)
    chosen, shares = exact_route(scores, TOP, True, True)
    exact = torch.cat([
        replace(weights, gate_up=_merged(weights.gate_up, ups, slot), down=_merged(weights.down, downs, slot)).exact_mixture(
            x[token : token + 1], chosen[token : token + 1], shares[token : token + 1], range(EXPERTS)[held]
        )
        for token, slot in enumerate(slots)
    ])  # fmt: skip

    count, load = held.stop - held.start, torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    routing = route(scores, load, Rule(TOP, True, True), held=count, first_held=held.start, size=size)
    of_tokens = torch.tensor(slots, dtype=torch.int32, device=device)

    def of_rank(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight[held].contiguous()

    def lora(weight: LoraWeights) -> LoraWeights:
        return LoraWeights(weight.a[:, held].contiguous(), weight.b[:, held].contiguous(), weight.rows)

    act = gate_up(
        x, weights.gate_up[held].contiguous(), routing, bias=of_rank(weights.gate_up_bias), in_turns=turns, clamp=weights.clamp,
        added=low_rank(x, lora(ups), routing, of_tokens, by_token=True, in_turns=turns), tiling=tiling,
    )  # fmt: skip
    added = low_rank(act, lora(downs), routing, of_tokens, by_token=False)
    parts = down(
        act, weights.down[held].contiguous(), routing, bias=of_rank(weights.down_bias), added=added, tiling=tiling
    )
    got = add_up(parts, routing, held=count, first_held=held.start)
    assert float((got.double() - exact).norm()) <= 3 * TOLERANCE[dtype] * float(exact.norm())


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("slots", MIXES)
def test_adapters_of_experts(device: str, turns: bool, slots: list[int]) -> None:
    _require_exact(torch.float32, device, slots, 8, turns=turns)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if CUDA else [])])
@pytest.mark.parametrize(
    ("size", "tiling", "rank", "hidden", "turns"),
    [(8, WIDE, 16, 1100, False), (32, SMALL, 64, 40, True), (32, MANY, 32, 40, False), (32, MANY, 16, 40, True)],
)
def test_adapters_of_experts_of_16_bits(
    device: str, dtype: torch.dtype, size: int, tiling: GroupedTiling | DenseTiling, rank: int, hidden: int, turns: bool
) -> None:
    """x that is split among programs, tiles of several adapters, and many pairs by the copy engine."""
    slots = [number % (SLOTS + 1) - 1 for number in range(11 if hidden > 40 else 40)]
    _require_exact(dtype, device, slots, size, rank=rank, hidden=hidden, turns=turns, tiling=tiling)


@pytest.mark.parametrize("device", DEVICES)
def test_a_ranks_experts_alone(device: str) -> None:
    _require_exact(torch.float32, device, MIXES[2], 8, held=slice(2, 4))
