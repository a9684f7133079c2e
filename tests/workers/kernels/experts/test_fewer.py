"""Experts in fewer bits, streamed and grouped, against float64 of the numbers that they stand for."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import CUDA, DEVICES, TOLERANCE, apart, exact_norm
from tests.workers.kernels.experts.mixtures import Weights, exact_route
from workers.kernels.experts.dense import DenseTiling
from workers.kernels.experts.gating import Clamp
from workers.kernels.experts.grouped import add_up, choose_tiling, down, gate_up, tile_size
from workers.kernels.experts.route import Rule, route
from workers.kernels.experts.stacked import Operand, Stacked
from workers.kernels.experts.stream import StreamTiling, choose_streaming, few_down, few_up
from workers.kernels.products.expand import expanded
from workers.kernels.reduced import Microscaled, Reduced

EXPERTS, TOP, EPS = 5, 2, 1e-5
RULE = Rule(TOP, True, True)


def stacked(kind: str, rows: int, columns: int, device: str) -> Stacked:
    """Random, numbers of about one by the root of the columns."""
    name, _, group = kind.partition("-")
    total = EXPERTS * rows
    if name == "mxfp4":
        found = Microscaled.empty(total, columns, torch.device(device))
        exponents = torch.randint(-8, -5, (total, columns // 32), device=device) + 127
        found.fill(torch.randint(0, 16, (total, columns), dtype=torch.uint8, device=device), exponents.to(torch.uint8))
        return Stacked(found, EXPERTS)
    bits = 8 if name == "fp8" else 4
    scale = torch.float32 if bits == 8 else torch.float16
    matrix = Reduced.empty(total, columns, bits, int(group or columns), scale, torch.device(device))
    scales = (0.5 + torch.rand(matrix.scales.shape, device=device)) * columns**-0.5
    if bits == 8:
        matrix.fill(torch.randn(total, columns, device=device).to(torch.float8_e4m3fn), scales)
    else:
        codes = torch.randint(0, 16, (total, columns), dtype=torch.uint8, device=device)
        matrix.fill(codes, scales / 4, torch.randint(5, 11, scales.shape, device=device))
    return Stacked(matrix, EXPERTS)


def mixture(kind: str, width: int, hidden: int, device: str, biased: bool) -> tuple[Stacked, Stacked, Weights]:
    """Gate and up, down, and what they stand for, in float64; as gpt-oss has them where there are biases."""
    gate_up, down = stacked(kind, 2 * width, hidden, device), stacked(kind, hidden, width, device)
    wide, narrow = (
        torch.stack([each.numbers(expert, torch.float64) for expert in range(EXPERTS)]) for each in (gate_up, down)
    )
    exact = Weights(wide, narrow)
    if biased:
        exact = replace(
            exact, gate_up_bias=torch.randn(EXPERTS, 2 * width, device=device),
            down_bias=torch.randn(EXPERTS, hidden, device=device), in_turns=True, clamp=Clamp(1.702, 1.5),
        )  # fmt: skip
    return gate_up, down, exact


def _off(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.few
@pytest.mark.parametrize("tiling", [None, StreamTiling(4, 128, 1, 3), StreamTiling(2, 128, 2)])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "dtype", "width", "hidden", "biased"),
    [
        ("mxfp4", torch.float32, 32, 160, True), ("mxfp4", torch.bfloat16, 32, 32, False),
        ("fp8", torch.float32, 16, 48, True), ("fp8-64", torch.float16, 64, 64, False),
        ("int4-32", torch.float32, 32, 64, True),
    ],
)  # fmt: skip
def test_few_tokens(
    device: str, kind: str, dtype: torch.dtype, width: int, hidden: int, biased: bool, tiling: StreamTiling | None
) -> None:
    """In several turns, the last of which is not full."""
    up, narrow, weights = mixture(kind, width, hidden, device, biased)
    x, norm = apart(torch.randn(2, hidden, device=device).to(dtype)), torch.randn(hidden, device=device).to(dtype)
    scores, live = torch.randn(2, EXPERTS, device=device), torch.tensor([True, False], device=device)
    chosen, shares = exact_route(scores, TOP, True, True)
    exact = x.double() + weights.exact_mixture(exact_norm(x, norm, EPS), chosen, shares, range(EXPERTS))
    before, load = x.clone(), torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    act, choice = few_up(
        x, norm, EPS, up, scores, load, RULE, live=live, bias=weights.gate_up_bias, in_turns=weights.in_turns,
        clamp=weights.clamp, tiling=tiling,
    )  # fmt: skip
    few_down(act, narrow, choice, scores, x, bias=weights.down_bias, tiling=tiling)
    assert _off(x[:1], exact[:1]) < 2 * TOLERANCE[dtype]
    assert torch.equal(x[1], before[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "dtype", "width", "hidden", "biased", "tokens"),
    [
        ("mxfp4", torch.float32, 32, 160, True, 2), ("mxfp4", torch.float16, 96, 64, True, 17),
        ("fp8", torch.float16, 48, 80, True, 2), ("fp8-64", torch.float32, 64, 64, False, 17),
        ("int4-32", torch.float32, 64, 64, True, 2), ("int4-128", torch.float16, 128, 128, False, 17),
        *([("mxfp4", torch.bfloat16, 96, 160, True, 99), ("fp8-64", torch.bfloat16, 64, 128, False, 99),
           ("int4-32", torch.bfloat16, 64, 64, True, 99)] if CUDA else []),  # the interpreter multiplies bfloat16's bits
    ],
)  # fmt: skip
def test_many_tokens(device: str, kind: str, dtype: torch.dtype, width: int, hidden: int, biased: bool, tokens: int) -> None:
    """Expert 1 has none of them; and the last two experts are a rank's own, whose share is added up by itself."""
    up, narrow, weights = mixture(kind, width, hidden, device, biased)
    x, scores = apart(torch.randn(tokens, hidden, device=device).to(dtype)), torch.randn(tokens, EXPERTS, device=device)
    scores[:, 1], scores[0, 4] = -9.0, 9.0
    chosen, shares = exact_route(scores, TOP, True, True)
    ups, downs = weights.gate_up_bias, weights.down_bias
    for first in (0, 3):
        held, load = EXPERTS - first, torch.zeros(EXPERTS, dtype=torch.int64, device=device)
        routing = route(scores, load, RULE, held=held, first_held=first, size=tile_size(tokens, TOP, EXPERTS))
        act = gate_up(
            x, up.part(first, EXPERTS), routing, bias=None if ups is None else ups[first:], in_turns=weights.in_turns,
            clamp=weights.clamp,
        )  # fmt: skip
        parts = down(act, narrow.part(first, EXPERTS), routing, bias=None if downs is None else downs[first:])
        exact = weights.exact_mixture(x, chosen, shares, range(first, EXPERTS))
        assert _off(add_up(parts, routing, held=held, first_held=first), exact) < 2 * TOLERANCE[dtype]


@pytest.mark.few(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "biased"), [("mxfp4", True), ("fp8", False), ("int4-32", True)])
def test_so_many_tokens_that_numbers_are_widened_before(
    device: str, kind: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, narrow, weights = mixture(kind, 64, 64, device, biased)
    x, scores = torch.randn(40, 64, device=device).to(torch.float16), torch.randn(40, EXPERTS, device=device)
    chosen, shares = exact_route(scores, TOP, True, True)
    routing = route(scores, torch.zeros(EXPERTS, dtype=torch.int64, device=device), RULE, held=EXPERTS, size=128)
    monkeypatch.setattr("workers.kernels.experts.grouped.LEAST_TO_EXPAND", {up.matrix.kind: 40 * TOP // EXPERTS})
    monkeypatch.setattr("workers.kernels.experts.dense.UP", DenseTiling(32, 32, 4, 3))
    monkeypatch.setattr("workers.kernels.experts.dense.DOWN", DenseTiling(32, 32, 4, 3))
    widened = mock.Mock(wraps=expanded)
    monkeypatch.setattr("workers.kernels.experts.grouped.expanded", widened)
    for most in (EXPERTS * 2 * 64 * 64 * 2, EXPERTS * 64 * 64 * 2):  # as many bytes as `up` takes, and as down does
        monkeypatch.setattr("workers.kernels.experts.grouped.MOST_EXPANDED_BYTES", most)
        act = gate_up(x, up, routing, bias=weights.gate_up_bias, in_turns=weights.in_turns, clamp=weights.clamp)
        parts = down(act, narrow, routing, bias=weights.down_bias)
        exact = weights.exact_mixture(x, chosen, shares, range(EXPERTS))
        assert _off(add_up(parts, routing, held=EXPERTS), exact) < 2 * TOLERANCE[torch.float16]
    assert [call.args[0] for call in widened.mock_calls] == [up.matrix, narrow.matrix, narrow.matrix]


@pytest.mark.parametrize(("kind", "group"), [("mxfp4", 32), ("fp8", 0), ("fp8", 64), ("fp8", 128), ("int4", 32), ("int4", 128)])
def test_what_is_read_at_a_time(kind: str, group: int) -> None:
    """Lies together, in shared memory that there is, and little of it beyond a row."""
    nothing = torch.empty(0)
    for columns in (2880, 1440, 2048, 4096, 768):
        if columns % (group or 16):
            continue
        span = {"mxfp4": 128, "fp8": 16, "int4": min(4 * group, columns & -columns)}[kind]
        w = Operand(nothing, nothing, nothing, kind, group, span)
        for gated in (True, False):
            at_once = choose_streaming(columns, gated, w).columns
            assert at_once % span == 0
            assert -(-columns // at_once) * at_once <= 1.34 * columns
            for size in (8, 16, 32, 64, 128):
                tiling = choose_tiling(size, torch.bfloat16, gated, w)
                assert (span if kind != "fp8" else group or 128) % tiling.columns == 0
                codes = tiling.rows * (2 if gated else 1) * tiling.columns // (1 if kind == "fp8" else 2)
                assert (codes + size * tiling.columns * 2) * tiling.stages <= 160 << 10


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_of_mxfp4_at_scales_of_any_size(device: str) -> None:
    """Of a hundred thousandth and of a million."""
    scores, load = torch.zeros(16, EXPERTS, device=device), torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    matrix = Microscaled.empty(EXPERTS * 16, 32, torch.device(device))
    codes = torch.arange(16, dtype=torch.uint8, device=device).repeat(EXPERTS * 16, 2)
    exponents = torch.arange(EXPERTS * 16, device=device)[:, None] % 16 * 2 + 110
    matrix.fill(codes, exponents.to(torch.uint8))
    routing = route(scores, load, Rule(1, True, True), held=EXPERTS, size=16)
    x = torch.eye(16, 32, device=device)
    got = down(x[routing.pairs.long()], Stacked(matrix, EXPERTS), routing)
    assert torch.equal(got, matrix.numbers(torch.float32)[:16, :16].T)
