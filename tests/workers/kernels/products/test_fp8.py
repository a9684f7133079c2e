"""Products of FP8 with FP8, against float64 over the numbers that both operands stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.kernels.devices import CUDA, DEVICES, TOLERANCE, apart, close, poisoned
from workers.kernels.products.many import product, rounds
from workers.kernels.products.matvec import matvec
from workers.kernels.products.tilings import MAX_TOKENS, Tiling, choose
from workers.kernels.reduced import Reduced
from workers.kernels.rows.norm import rounded_norm
from workers.kernels.rows.rounding import rounded

EPS = 1e-6
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter would cut bfloat16 off
N, K = 128, 512
GROUPS = {"rows": K, "groups": 64, "large groups": 128, "blocks": 128}
CONFIGS = {
    "all of K at once": Tiling(64, 128, 4, 2, 1, rounded=True), "K among programs": Tiling(64, 128, 4, 2, 4, rounded=True),
    "small tiles": Tiling(16, 64, 4, 3, 2, rounded=True),
}  # fmt: skip


def made(form: str, rows: int, device: str, columns: int = K) -> Reduced:
    """Everything is different in every row and group, or block."""
    group = columns if form == "rows" else GROUPS[form]
    weight = Reduced.empty(rows, columns, 8, group, torch.float32, torch.device(device))
    scales = torch.rand(weight.scales.shape) / 8 + 0.05
    if form == "blocks":
        scales = scales[::128].repeat_interleave(128, 0)[:rows]
    weight.fill((torch.randn(rows, columns) / 2).to(torch.float8_e4m3fn), scales)
    return weight.filled()


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", GROUPS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize(
    ("norm", "bias", "residual", "swiglu"), [(True, True, True, False), (True, True, False, True), (False, False, False, False)]
)
def test_matvec(device: str, form: str, name: str, tokens: int, norm: bool, bias: bool, residual: bool, swiglu: bool) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(DTYPE)

    x, weight = apart(normal(tokens, K)), made(form, 2 * N if swiglu else N, device)
    assert (weight.blocks is not None) == (form == "blocks")
    norm_weight, its_bias = normal(K) if norm else None, normal(weight.shape[0]) if bias else None
    near = rounded(x, weight.group) if norm_weight is None else rounded_norm(x, norm_weight, EPS, weight.group)
    expected = F.linear(
        near.numbers(torch.float64), weight.numbers(torch.float64), None if its_bias is None else its_bias.double()
    )
    if swiglu:
        gate, up = expected.chunk(2, -1)
        expected = F.silu(gate) * up
    out = normal(tokens, N) if residual else None
    if out is not None:
        expected += out.double()
    counters = torch.zeros(N // 16, dtype=torch.int32, device=device)
    place = None if residual else poisoned(tokens, N, dtype=DTYPE, device=device)
    result = matvec(x, weight, norm_weight=norm_weight, eps=EPS, bias=its_bias, residual=out, swiglu=swiglu, out=place,
                    counters=counters, config=CONFIGS[name])  # fmt: skip
    assert not counters.any()
    close(result, expected, DTYPE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["rows", "groups"])
def test_rows_that_do_not_fill_a_tile(device: str, form: str) -> None:
    x, weight = torch.randn(5, K, device=device).to(DTYPE), made(form, 100, device)
    expected = rounded(x, weight.group).numbers(torch.float64) @ weight.numbers(torch.float64).T
    close(matvec(x, weight, config=CONFIGS["all of K at once"]), expected, DTYPE)


@pytest.mark.parametrize("device", DEVICES)
def test_programs_count_themselves(device: str) -> None:
    x, weight = torch.randn(3, K, device=device), made("rows", N, device)
    with pytest.raises(ValueError, match="give 2 counters"):
        matvec(x, weight, config=CONFIGS["K among programs"], counters=torch.zeros(1, device=device))


@pytest.mark.parametrize(
    ("n", "k", "swiglu"),
    [(6144, 4096, False), (4096, 4096, False), (12288, 4096, True), (4096, 12288, False), (1024, 3072, False)],
)
def test_programs_fill_the_device_and_have_enough_to_add_up(n: int, k: int, swiglu: bool) -> None:
    for tokens in (5, 32, 33, MAX_TOKENS):
        config = choose(n, k, tokens, torch.bfloat16, swiglu, 8)
        assert config is not None
        assert config.rounded
        assert config.columns == 128, "tensor cores add up no more with enough precision"
        assert 60 < config.blocks(n) * config.parts <= 256
        assert k // config.parts >= 512
    for dtype in (torch.float16, torch.float32):
        config = choose(n, k, 8, dtype, swiglu, 8)
        assert config is None or not config.rounded


@pytest.mark.skipif(not CUDA, reason="the library has FP8 on a GPU alone")
@pytest.mark.parametrize("form", ["rows", "blocks"])
@pytest.mark.parametrize("tokens", [65, 101, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_may_come_rounded(form: str, tokens: int, bias: bool) -> None:
    x, weight = torch.randn(tokens, K, device="cuda").to(DTYPE), made(form, N, "cuda")
    if not rounds(weight, tokens, DTYPE):
        pytest.skip("not of this library")
    its_bias = torch.randn(N, device="cuda").to(DTYPE) if bias else None
    near = rounded(x, weight.group)
    expected = near.numbers(torch.float64) @ weight.numbers(torch.float64).T
    if its_bias is not None:
        expected += its_bias.double()
    for operand in (x, near):
        result = product(operand, weight, its_bias)
        assert result.shape == (tokens, N)
        assert float((result.double() - expected).norm() / expected.norm()) < 2 * TOLERANCE[DTYPE]
