"""Products grouped by expert and their sums, against float64."""

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import CUDA, DEVICES, TOLERANCE, apart
from tests.workers.kernels.experts.mixtures import Weights, exact_route
from workers.kernels.experts.dense import DenseTiling
from workers.kernels.experts.grouped import GroupedTiling, add_up, choose_tiling, down, gate_up, tile_size
from workers.kernels.experts.route import Routing, Rule, route

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # the interpreter multiplies bfloat16's bits
EXPERTS, TOP = 6, 2
SMALL = GroupedTiling(16, 32, 4, 2)


def _routing(scores: Tensor, size: int = 8, held: int = EXPERTS, first_held: int = 0, live: Tensor | None = None) -> Routing:
    load = torch.zeros(EXPERTS, dtype=torch.int64, device=scores.device)
    return route(scores, load, Rule(TOP, True, True), held=held, first_held=first_held, size=size, live=live)


def _run(
    x: Tensor, weights: Weights, routing: Routing, first_held: int = 0, tiling: GroupedTiling | DenseTiling | None = SMALL,
    shared: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """first_held: the rank has all from there on."""
    held = slice(first_held, EXPERTS)
    ups = None if weights.gate_up_bias is None else weights.gate_up_bias[held].contiguous()
    downs = None if weights.down_bias is None else weights.down_bias[held].contiguous()
    act = gate_up(
        x, weights.gate_up[held].contiguous(), routing, bias=ups, in_turns=weights.in_turns, clamp=weights.clamp, tiling=tiling
    )
    parts = down(act, weights.down[held].contiguous(), routing, bias=downs, tiling=tiling)
    return add_up(parts, routing, held=len(weights.down[held]), first_held=first_held, shared=shared, residual=residual)


def _close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Two roundings on the way beside the last."""
    assert float((got.double() - exact).norm() / exact.norm()) < 2 * TOLERANCE[dtype]


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "clamped"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(1, 32, 64), (13, 24, 40)])
def test_a_mixture(device: str, dtype: torch.dtype, bias: bool, clamped: bool, tokens: int, width: int, hidden: int) -> None:
    weights = Weights.random(EXPERTS, width, hidden, dtype, device, bias, clamped)
    x, scores = apart(torch.randn(tokens, hidden, device=device).to(dtype)), torch.randn(tokens, EXPERTS, device=device)
    chosen, shares = exact_route(scores, TOP, True, True)
    _close(_run(x, weights, _routing(scores)), weights.exact_mixture(x, chosen, shares, range(EXPERTS)), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_tokens_on_one_expert_in_several_tiles(device: str, dtype: torch.dtype) -> None:
    weights = Weights.random(EXPERTS, 16, 32, dtype, device)
    x, scores = torch.randn(19, 32, device=device).to(dtype), torch.full((19, EXPERTS), -5.0, device=device)
    scores[:, 4], scores[:, 0] = 3.0, 2.0
    chosen, shares = exact_route(scores, TOP, True, True)
    _close(_run(x, weights, _routing(scores)), weights.exact_mixture(x, chosen, shares, range(EXPERTS)), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_the_fixed_choice(device: str) -> None:
    dtype = torch.float16
    weights = Weights.random(EXPERTS, 64, 128, dtype, device)
    for tokens in (2, 30, 150):
        x, scores = torch.randn(tokens, 128, device=device).to(dtype), torch.randn(tokens, EXPERTS, device=device)
        chosen, shares = exact_route(scores, TOP, True, True)
        routing = _routing(scores, tile_size(tokens, TOP, EXPERTS))
        _close(_run(x, weights, routing, tiling=None), weights.exact_mixture(x, chosen, shares, range(EXPERTS)), dtype)


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize(("tokens", "width", "hidden", "resident"), [(40, 24, 40, False), (70, 64, 128, True)])
def test_many_tokens_of_each_expert(device: str, clamped: bool, tokens: int, width: int, hidden: int, resident: bool) -> None:
    dtype = torch.float16
    weights = Weights.random(EXPERTS, width, hidden, dtype, device, clamped, clamped)
    x, scores = apart(torch.randn(tokens, hidden, device=device).to(dtype)), torch.randn(tokens, EXPERTS, device=device)
    chosen, shares = exact_route(scores, TOP, True, True)
    got = _run(x, weights, _routing(scores, 16), tiling=DenseTiling(32, 32, 4, 3, resident))
    _close(got, weights.exact_mixture(x, chosen, shares, range(EXPERTS)), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_shares_of_experts_add_up(device: str) -> None:
    weights = Weights.random(EXPERTS, 16, 32, torch.float32, device, bias=True)
    x, scores = torch.randn(9, 32, device=device), torch.randn(9, EXPERTS, device=device)
    chosen, shares = exact_route(scores, TOP, True, True)
    last = _run(x, weights, _routing(scores, held=2, first_held=4), first_held=4)
    _close(last, weights.exact_mixture(x, chosen, shares, range(4, 6)), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tokens_bits_do_not_depend_on_the_others(device: str) -> None:
    weights = Weights.random(EXPERTS, 16, 32, torch.float16, device)
    x, scores = torch.randn(21, 32, device=device).half(), torch.randn(21, EXPERTS, device=device)
    whole = _run(x, weights, _routing(scores))
    for rows in (slice(20, 21), slice(3, 12)):
        assert torch.equal(_run(x[rows], weights, _routing(scores[rows])), whole[rows])


@pytest.mark.parametrize("device", DEVICES)
def test_the_residual_and_a_shared_expert(device: str) -> None:
    dtype = torch.float16
    weights = Weights.random(EXPERTS, 16, 32, dtype, device)
    x = torch.randn(7, 32, device=device).to(dtype)
    scores = torch.randn(7, EXPERTS + 1, device=device)
    residual, shared = (apart(torch.randn(7, 32, device=device).to(dtype)) for _ in range(2))
    chosen, shares = exact_route(scores[:, :EXPERTS], TOP, True, True)
    exact = weights.exact_mixture(x, chosen, shares, range(EXPERTS))
    exact = exact + residual.double() + scores[:, EXPERTS:].double().sigmoid() * shared.double()
    assert _run(x, weights, _routing(scores), shared=shared, residual=residual) is residual
    _close(residual, exact, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_changes_nothing(device: str) -> None:
    weights = Weights.random(EXPERTS, 16, 32, torch.float32, device)
    x, scores = torch.randn(11, 32, device=device), torch.randn(11, EXPERTS, device=device)
    live = torch.arange(11, device=device) < 4
    x[4:] = torch.nan
    residual = torch.randn(11, 32, device=device)
    before = residual.clone()
    _run(x, weights, _routing(scores, live=live), residual=residual)
    assert torch.equal(residual[4:], before[4:])
    assert torch.equal(residual[:4], _run(x[:4], weights, _routing(scores[:4]), residual=before[:4].clone()))


def test_sizes_of_tiles() -> None:
    assert [tile_size(tokens, 8, 128) for tokens in (1, 8, 9, 128, 129, 256, 512, 8192)] == [8, 8, 16, 16, 16, 32, 64, 128]
    assert [tile_size(tokens, 2, 8) for tokens in (1, 16, 17, 64, 256)] == [8, 16, 16, 32, 128]
    for size in (8, 16, 32, 64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            for gated in (False, True):
                tiling = choose_tiling(size, dtype, gated)
                rows = tiling.rows * (2 if gated else 1)
                assert (rows + size) * tiling.columns * dtype.itemsize * tiling.stages <= 96 << 10
