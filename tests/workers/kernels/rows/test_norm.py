"""RMSNorm, the residual's sum before it, and the embedding before it, against float64."""

import pytest
import torch

from tests.workers.kernels.devices import DEVICES, DTYPES, apart, close, exact_norm, poisoned, rounded
from workers.kernels.rows.embed import embed_norm
from workers.kernels.rows.norm import add_rms_norm, rms_norm

EPS = 1e-6
SHAPES = [(1, 128), (3, 100), (17, 1000)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norm(device: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight = 3 * torch.randn(tokens, width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
    exact = exact_norm(x, weight, EPS)
    close(rms_norm(x, weight, EPS), exact, dtype)
    out = apart(poisoned(tokens, width, dtype=dtype, device=device))
    assert rms_norm(apart(x), weight, EPS, out) is out
    close(out, exact, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_the_sum_is_rounded_before_its_norm(device: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    hidden, delta = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=device).to(dtype)
    total = rounded(hidden.float() + delta.float(), dtype)
    out = poisoned(tokens, width, dtype=dtype, device=device)
    assert add_rms_norm(hidden, apart(delta), weight, EPS, out) is out
    assert torch.equal(hidden, total)
    close(out, exact_norm(total, weight, EPS), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_embedding(device: str, dtype: torch.dtype, ids: torch.dtype) -> None:
    table, weight = torch.randn(50, 100, device=device).to(dtype), torch.randn(100, device=device).to(dtype)
    tokens = torch.tensor([49, 0, 7, 7], dtype=ids, device=device)
    hidden, normed = (poisoned(4, 100, dtype=dtype, device=device) for _ in range(2))
    embed_norm(tokens, table, weight, EPS, hidden, normed)
    assert torch.equal(hidden, table[tokens.long()])
    close(normed, exact_norm(hidden, weight, EPS), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    none, weight = torch.empty(0, 32, device=device), torch.ones(32, device=device)
    assert rms_norm(none, weight, EPS).shape == add_rms_norm(none, none, weight, EPS).shape == (0, 32)
