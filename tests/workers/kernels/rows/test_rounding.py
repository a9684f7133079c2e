"""Activations in FP8: within half a step of what they are, alone, behind a norm and behind SwiGLU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.kernels.devices import CUDA, DEVICES, apart, exact_norm
from tests.workers.kernels.devices import rounded as rounded_to
from workers.kernels.reduced import LARGEST_FP8, Rounded, rounded_rows
from workers.kernels.rows.norm import rounded_norm
from workers.kernels.rows.rounding import rounded, silu_mul_rounded

EPS = 1e-6
TOKENS, WIDTH = 3, 384
GROUPS = [64, 128, WIDTH]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # the interpreter cuts bfloat16 off


def near(result: Rounded, exact: Tensor, group: int) -> None:
    """Of each group the largest is FP8's largest, and the others are at most half a step apart."""
    tokens = len(exact)
    assert (len(result), result.group, len(result.values) % 4) == (tokens, group, 0)
    largest = exact.view(tokens, -1, group).abs().amax(2)
    scales = result.scales[:, :tokens].T.double()
    torch.testing.assert_close(scales, largest / LARGEST_FP8, rtol=1e-5, atol=1e-29)
    step = 1 / 16 if CUDA else 1 / 8  # the interpreter loses what is carried into the exponent
    bound = step * (1 + 1e-4) * exact.abs() + scales.repeat_interleave(group, 1) / 512
    assert bool(((result.numbers(torch.float64) - exact).abs() <= bound).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", GROUPS)
def test_rounded(device: str, group: int) -> None:
    x = apart(torch.randn(TOKENS, WIDTH, device=device) * torch.tensor([[1.0], [1e-3], [0.0]], device=device))
    result = rounded(x, group)
    near(result, x.double(), group)
    assert not result.values[2].float().any()
    expected, _ = rounded_rows(x.reshape(-1, group))
    same = (result.values[:TOKENS].float().view(-1, group) == expected.float()).float().mean()
    assert float(same) > (0.999 if CUDA else 0.95)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_a_norm_is_rounded_but_once(device: str, dtype: torch.dtype, group: int) -> None:
    x, delta = (apart(torch.randn(TOKENS, WIDTH, device=device).to(dtype)) for _ in range(2))
    weight = torch.randn(WIDTH, device=device).to(dtype)
    near(rounded_norm(x, weight, EPS, group), exact_norm(x, weight, EPS), group)
    total = rounded_to(x.float() + delta.float(), dtype)
    result = rounded_norm(x, weight, EPS, group, delta)
    assert torch.equal(x, total)
    assert result.dtype == dtype
    near(result, exact_norm(total, weight, EPS), group)


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", GROUPS)
def test_nan_stays_nan(device: str, group: int) -> None:
    """Else a sequence whose numbers have run over would go on with others instead of failing."""
    x = torch.randn(TOKENS, WIDTH, device=device)
    x[0, 5], x[1, 7], x[2] = torch.nan, torch.inf, torch.nan
    numbers = rounded(x, group).numbers(torch.float64)
    assert numbers[0].isnan().nonzero().tolist() == [[5]]
    assert numbers[1].isnan().sum() == group
    assert numbers[2].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", GROUPS)
def test_swiglu(device: str, group: int) -> None:
    gate_up = apart(torch.randn(TOKENS, 2 * WIDTH, device=device))
    gate, up = gate_up.double().chunk(2, -1)
    near(silu_mul_rounded(gate_up, group), F.silu(gate) * up, group)


@pytest.mark.parametrize("device", DEVICES)
def test_more_columns_than_a_program_takes(device: str) -> None:
    x = torch.randn(2, 2048 + 384, device=device)
    near(rounded(x, 128), x.double(), 128)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    none = torch.empty(0, WIDTH, device=device)
    results = rounded(none, 128), silu_mul_rounded(none, WIDTH // 2), rounded_norm(none, none.new_ones(WIDTH), EPS, WIDTH)
    assert [result.numbers(torch.float32).shape for result in results] == [(0, WIDTH), (0, WIDTH // 2), (0, WIDTH)]
