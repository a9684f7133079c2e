"""The experts of few tokens, pair by pair, against float64."""

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import DEVICES, DTYPES, TOLERANCE, apart, exact_norm
from tests.workers.kernels.experts.mixtures import Weights, exact_route
from workers.kernels.experts.route import Rule, choose
from workers.kernels.experts.stream import DownTiling, UpTiling, few_down, few_up

EXPERTS, EPS = 6, 1e-5


def _add(
    hidden: Tensor, norm: Tensor, weights: Weights, scores: Tensor, top: int, live: Tensor | None = None,
    shared: Tensor | None = None, up: UpTiling | None = None, down: DownTiling | None = None,
) -> None:  # fmt: skip
    load = torch.zeros(EXPERTS, dtype=torch.int64, device=hidden.device)
    act, choice = few_up(
        hidden, norm, EPS, weights.gate_up, scores, load, Rule(top, True, True), live=live, bias=weights.gate_up_bias,
        in_turns=weights.in_turns, clamp=weights.clamp, tiling=up,
    )  # fmt: skip
    few_down(act, weights.down, choice, scores, hidden, bias=weights.down_bias, shared=shared, tiling=down)
    counted = torch.zeros_like(load)
    alone = choose(scores, counted, Rule(top, True, True), live=live)
    assert torch.equal(choice.chosen, alone.chosen)
    assert torch.equal(choice.weights, alone.weights)
    assert torch.equal(load, counted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "clamped"), [(False, False), (True, True)])
@pytest.mark.parametrize(("tokens", "width", "hidden", "top"), [(1, 32, 64, 2), (4, 25, 40, 3), (1, 16, 2056, 1)])
def test_a_mixture(
    device: str, dtype: torch.dtype, bias: bool, clamped: bool, tokens: int, width: int, hidden: int, top: int
) -> None:
    weights = Weights.random(EXPERTS, width, hidden, dtype, device, bias, clamped)
    x, norm = apart((3 * torch.randn(tokens, hidden, device=device)).to(dtype)), torch.randn(hidden, device=device).to(dtype)
    scores = torch.randn(tokens, EXPERTS, device=device)
    chosen, shares = exact_route(scores, top, True, True)
    exact = x.double() + weights.exact_mixture(exact_norm(x, norm, EPS), chosen, shares, range(EXPERTS))
    _add(x, norm, weights, scores, top)
    assert float((x.double() - exact).norm() / exact.norm()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("up", "down"), [(UpTiling(2, 3, 4, 2), DownTiling(2, 16, 2, 1)), (UpTiling(4, 2, 2, 3), DownTiling(8, 8, 4, 3))]
)
def test_tilings(device: str, up: UpTiling, down: DownTiling) -> None:
    """With rows and turns beyond the last."""
    weights = Weights.random(EXPERTS, 20, 40, torch.float32, device, bias=True)
    x, norm = torch.randn(2, 40, device=device), torch.ones(40, device=device)
    scores = torch.randn(2, EXPERTS, device=device)
    chosen, shares = exact_route(scores, 3, True, True)
    exact = x.double() + weights.exact_mixture(exact_norm(x, norm, EPS), chosen, shares, range(EXPERTS))
    _add(x, norm, weights, scores, 3, up=up, down=down)
    assert float((x.double() - exact).norm() / exact.norm()) < 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_many_turns_go_around_in_a_loop(device: str) -> None:
    weights = Weights.random(EXPERTS, 8 * 128 + 8, 16, torch.float32, device)
    x, norm = torch.randn(1, 16, device=device), torch.ones(16, device=device)
    scores = torch.randn(1, EXPERTS, device=device)
    chosen, shares = exact_route(scores, EXPERTS, True, True)
    exact = x.double() + weights.exact_mixture(exact_norm(x, norm, EPS), chosen, shares, range(EXPERTS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("workers.kernels.experts.stream.MOST_UNROLLED", 4)
        _add(x, norm, weights, scores, EXPERTS)
    assert float((x.double() - exact).norm() / exact.norm()) < 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_a_shared_expert_and_padding(device: str) -> None:
    weights = Weights.random(EXPERTS, 16, 32, torch.float32, device)
    hidden, shared = torch.randn(3, 32, device=device), torch.randn(3, 32, device=device)
    norm, scores = torch.ones(32, device=device), torch.randn(3, EXPERTS + 1, device=device)
    hidden[1] = torch.nan
    live = torch.tensor([True, False, True], device=device)
    chosen, shares = exact_route(scores[:, :EXPERTS], 2, True, True)
    exact = hidden.double() + weights.exact_mixture(exact_norm(hidden, norm, EPS), chosen, shares, range(EXPERTS))
    exact = exact + scores[:, EXPERTS:].double().sigmoid() * shared.double()
    _add(hidden, norm, weights, scores, 2, live, shared)
    torch.testing.assert_close(hidden[live].double(), exact[live], rtol=1e-5, atol=1e-5)
    assert hidden[1].isnan().all()
