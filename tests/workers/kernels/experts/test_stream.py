"""The experts of few tokens, pair by pair, against float64."""

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import DEVICES, DTYPES, TOLERANCE, apart, exact_norm
from tests.workers.kernels.experts.mixtures import Weights, exact_route
from workers.kernels.experts.route import Choice, Rule, choose
from workers.kernels.experts.stream import few_down, few_up

EXPERTS, EPS = 6, 1e-5


def _add(
    hidden: Tensor, norm: Tensor, weights: Weights, scores: Tensor, top: int, live: Tensor | None = None,
    shared: Tensor | None = None,
) -> None:  # fmt: skip
    load = torch.zeros(EXPERTS, dtype=torch.int64, device=hidden.device)
    act, choice = few_up(
        hidden, norm, EPS, weights.gate_up, scores, load, Rule(top, True, True), live=live, bias=weights.gate_up_bias,
        in_turns=weights.in_turns, clamp=weights.clamp,
    )  # fmt: skip
    few_down(act, weights.down, choice, scores, hidden, bias=weights.down_bias, shared=shared)
    _same_choice(choice, load, scores, Rule(top, True, True), live)


def _same_choice(choice: Choice, load: Tensor, scores: Tensor, rule: Rule, live: Tensor | None) -> None:
    """As `choose` has it: experts and counts are the same, weights but for the order in which warps add them up."""
    counted = torch.zeros_like(load)
    alone = choose(scores, counted, rule, live=live)
    assert torch.equal(choice.chosen, alone.chosen)
    assert torch.equal(load, counted)
    torch.testing.assert_close(choice.weights, alone.weights, rtol=1e-6, atol=0)
    assert (choice.gates is None) == (alone.gates is None)
    if choice.gates is not None and alone.gates is not None:
        torch.testing.assert_close(choice.gates, alone.gates, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "clamped"), [(False, False), (True, True)])
@pytest.mark.parametrize(("tokens", "width", "hidden", "top"), [(1, 32, 64, 2), (4, 25, 42, 3), (1, 16, 2056, 1)])
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


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("of_all", "normalized"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("experts", "top"), [(128, 8), (60, 4)])
def test_products_choose_as_a_choice_by_itself(device: str, of_all: bool, normalized: bool, experts: int, top: int) -> None:
    """Of scores some of which are equal, at the edge of the choice too; and both products go through these experts."""
    weights = Weights.random(experts, 8, 16, torch.float32, device)
    x, norm = torch.randn(4, 16, device=device), torch.ones(16, device=device)
    scores = torch.randn(4, experts + 1, device=device)
    scores[1], scores[2] = scores[1].round(), scores[2].clamp(max=0.5)
    live = torch.tensor([True, True, True, False], device=device)
    load, rule = torch.zeros(experts, dtype=torch.int64, device=device), Rule(top, of_all, normalized)
    act, choice = few_up(x, norm, EPS, weights.gate_up, scores, load, rule, live=live)
    _same_choice(choice, load, scores, rule, live)
    chosen, shares = exact_route(scores[:, :experts], top, of_all, normalized)
    assert torch.equal(choice.chosen[live].long(), chosen[live])
    exact = x.double() + weights.exact_mixture(exact_norm(x, norm, EPS), chosen, shares, range(experts))
    few_down(act, weights.down, choice, scores, x)
    assert float((x[live].double() - exact[live]).norm() / exact[live].norm()) < 2 * TOLERANCE[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unrolled", [4, 8])
def test_turns_one_after_another_or_in_a_loop(device: str, unrolled: int) -> None:
    weights = Weights.random(EXPERTS, 8 * 128 + 8, 16, torch.float32, device)
    x, norm = torch.randn(1, 16, device=device), torch.ones(16, device=device)
    scores = torch.randn(1, EXPERTS, device=device)
    chosen, shares = exact_route(scores, EXPERTS, True, True)
    exact = x.double() + weights.exact_mixture(exact_norm(x, norm, EPS), chosen, shares, range(EXPERTS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("workers.kernels.experts.stream.MOST_UNROLLED", unrolled)
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
