"""Products with matrices in fewer bits, against float64 over the numbers that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.kernels.devices import CUDA, DEVICES, TOLERANCE, apart, close, exact_norm
from workers.kernels.products.expand import expanded
from workers.kernels.products.many import product
from workers.kernels.products.matvec import matvec
from workers.kernels.products.tilings import MAX_TOKENS, Tiling, choose
from workers.kernels.reduced import Microscaled, Reduced

EPS = 1e-6
N = 12
FORMS = {"FP8, rows": (8, 0), "FP8, groups": (8, 64), "four bits": (4, 32), "four bits, large groups": (4, 128)}
CONFIGS = {
    "a row at once": Tiling(4, 512, 4), "edges": Tiling(8, 128, 4), "through shared memory": Tiling(4, 128, 4, 3),
    "tensor cores": Tiling(16, 128, 4, 2, 1), "tensor cores, K among programs": Tiling(16, 64, 4, 2, 2),
}  # fmt: skip


def made(form: str, rows: int, columns: int, device: str) -> Reduced:
    """Random, with everything different in every row and group."""
    bits, group = FORMS[form]
    weight = Reduced.empty(rows, columns, bits, group or columns, torch.float32, torch.device(device))
    scales = torch.rand(weight.scales.shape) / 8 + 0.05
    if bits == 8:
        weight.fill((torch.randn(rows, columns) / 2).to(torch.float8_e4m3fn), scales)
    else:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        weight.fill(codes, scales / 8, torch.randint(0, 16, weight.scales.shape))
    return weight


def exact(x: Tensor, weight: Reduced, norm: Tensor | None, bias: Tensor | None, swiglu: bool) -> Tensor:
    wide = x.double() if norm is None else exact_norm(x, norm, EPS)
    y = F.linear(wide, weight.numbers(torch.float64), None if bias is None else bias.double())
    if not swiglu:
        return y
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("norm", "bias", "residual", "swiglu"), [(True, True, True, False), (True, True, False, True), (False, False, False, False)]
)
def test_matvec(device: str, form: str, name: str, tokens: int, norm: bool, bias: bool, residual: bool, swiglu: bool) -> None:
    config = CONFIGS[name]
    dtype = torch.float16 if config.parts else torch.float32
    columns = 384

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight = apart(normal(tokens, columns)), made(form, 2 * N if swiglu else N, columns, device)
    norm_weight, its_bias = normal(columns) if norm else None, normal(weight.shape[0]) if bias else None
    expected = exact(x, weight, norm_weight, its_bias, swiglu)
    out = normal(tokens, N) if residual else None
    if out is not None:
        expected += out.double()
    counters = torch.zeros(4, dtype=torch.int32, device=device)
    result = matvec(x, weight, norm_weight=norm_weight, eps=EPS, bias=its_bias, residual=out, swiglu=swiglu, counters=counters,
                    config=config)  # fmt: skip
    assert not counters.any()
    close(result, expected, dtype)


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["four bits", "four bits, large groups"])
@pytest.mark.parametrize(("columns", "parts"), [(512, 2), (256, 4), (64, 1)])
@pytest.mark.parametrize("swiglu", [False, True])
def test_spans_of_four_groups(device: str, form: str, columns: int, parts: int, swiglu: bool) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float16
    x, weight = apart(torch.randn(3, 1024, device=device).to(dtype)), made(form, 64 if swiglu else 32, 1024, device)
    assert weight.span == 4 * weight.group
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    result = matvec(x, weight, swiglu=swiglu, counters=counters, config=Tiling(16, columns, 1, 2, parts))
    assert not counters.any()
    close(result, exact(x, weight, None, None, swiglu), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [384, 1024, 1152])
def test_expanded(device: str, form: str, columns: int) -> None:
    weight = made(form, 7, columns, device)
    assert torch.equal(expanded(weight, torch.float32), weight.numbers(torch.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [32, 160, 1152])
def test_expanded_of_blocks_that_share_a_power_of_two(device: str, columns: int) -> None:
    weight = Microscaled.empty(7, columns, torch.device(device))
    scales = torch.randint(60, 190, (7, columns // 32), dtype=torch.uint8, device=device)
    weight.fill(torch.randint(0, 16, (7, columns), dtype=torch.uint8, device=device), scales)
    assert torch.equal(expanded(weight, torch.float32), weight.numbers(torch.float32))


def of_fp8(tokens: int, columns: int, device: str) -> Tensor:
    """Numbers that rounding to FP8 leaves as they are: whatever the group, it has the largest in it."""
    x = (32 * torch.randn(tokens, columns)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    x[:, ::32] = 448
    return x.to(device) / 256


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 1, 9, 65])
def test_any_number_of_tokens(device: str, form: str, tokens: int) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float16
    x, weight = of_fp8(tokens, 256, device).to(dtype), made(form, 32, 256, device)
    bias = torch.randn(32, device=device).to(dtype)
    result, expected = product(x, weight, bias), exact(x, weight, None, bias, False)
    assert result.shape == (tokens, 32)
    if tokens:
        assert float((result.double() - expected).norm() / expected.norm()) < 4 * TOLERANCE[dtype]


def test_four_bits_of_few_tokens_are_never_widened_into_memory() -> None:
    for rows, columns in ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096), (1024, 1024), (512, 11008)):
        for tokens in range(1, MAX_TOKENS + 1):
            config = choose(rows, columns, tokens, torch.bfloat16, False, 4)
            assert config is not None
            assert not config.parts or columns // config.parts % config.columns == 0


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_found_once_they_are_filled(device: str) -> None:
    weight = Reduced.empty(256, 384, 8, 128, torch.float16, torch.device(device))
    scales = torch.rand(2, 3).half()
    weight.fill(torch.zeros(256, 384).to(torch.float8_e4m3fn), scales.repeat_interleave(128, 0))
    weight = weight.filled()
    assert weight.blocks is not None
    assert torch.equal(weight.blocks.cpu(), scales.float())
    weight.scales[130, 1] += 1
    assert weight.filled().blocks is None


@pytest.mark.parametrize(("rows", "columns", "group"), [(130, 256, 128), (128, 256, 64), (128, 256, 256)])
def test_nothing_else_is_in_blocks(rows: int, columns: int, group: int) -> None:
    weight = Reduced.empty(rows, columns, 8, group, torch.float32, torch.device("cpu"))
    weight.scales.fill_(1)
    assert weight.filled().blocks is None
