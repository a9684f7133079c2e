"""Small-batch products and what is fused with them, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.kernels.devices import CUDA, DEVICES, DTYPES, apart, close, exact_norm, gpu, poisoned
from workers.kernels.products.matvec import matvec
from workers.kernels.products.prenormed import Prenormed
from workers.kernels.products.tilings import MOST_TOKENS, STREAM_TOKENS, Tiling, choose

EPS = 1e-6
CONFIGS = {
    "edges in both": Tiling(8, 128, 4),
    "through shared memory": Tiling(4, 64, 4, 3),
    "tensor cores": Tiling(16, 64, 4, 2, 1),
    "tensor cores, a single turn": Tiling(16, 64, 4, 2, 3),
    "tensor cores, K among programs": Tiling(16, 32, 4, 2, 2),
    "tensor cores, tokens too": Tiling(16, 32, 4, 2, 2, tokens=4),
    "tensor cores, by the copy engine": Tiling(16, 64, 4, 2, 1, described=True),
    "tensor cores, K among programs, by the copy engine": Tiling(16, 32, 4, 2, 2, described=True),
}
N, K = 12, 192


def _exact(x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, swiglu: bool) -> Tensor:
    wide = x.double() if norm is None else exact_norm(x, norm, EPS)
    y = F.linear(wide, weight.double(), None if bias is None else bias.double())
    if not swiglu:
        return y
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.few
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(
    ("norm", "bias", "residual", "swiglu"),
    [(False, False, False, False), (True, True, True, False), (True, True, False, True), (False, False, True, False)],
)
def test_matvec(
    device: str, dtype: torch.dtype, name: str, tokens: int, norm: bool, bias: bool, residual: bool, swiglu: bool
) -> None:
    config = CONFIGS[name]
    if config.parts and (dtype == torch.float32 or not (CUDA or dtype == torch.float16)):
        pytest.skip("tensor cores take 16 bits, and the interpreter multiplies bfloat16's bits")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight = apart(2 * normal(tokens, K)), normal(2 * N if swiglu else N, K) / 8
    norm_weight, its_bias = normal(K) if norm else None, normal(len(weight)) if bias else None
    exact = _exact(x, weight, norm_weight, its_bias, swiglu)
    room = normal(tokens + 1, N) if residual else poisoned(tokens + 1, N, dtype=dtype, device=device)
    out, last = room[:tokens], room[tokens].clone()
    if residual:
        exact += out.double()
    result = matvec(
        x, weight, norm_weight=norm_weight, eps=EPS, bias=its_bias, residual=out if residual else None, swiglu=swiglu,
        out=None if residual else out, counters=(counters := torch.zeros(4, dtype=torch.int32, device=device)), config=config,
    )  # fmt: skip
    assert result is out
    close(out, exact, dtype)
    assert not counters.any()
    assert torch.equal(room[tokens].nan_to_num(7.0), last.nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize(("tokens", "together", "parts"), [(7, 64, 2), (37, 16, 3), (70, 32, 1)])
def test_a_norm_is_left_to_the_next_product(device: str, dtype: torch.dtype, tokens: int, together: int, parts: int) -> None:
    """`together`: tokens of a program. Three tiles of rows leave their squares, the last one those of half as many rows."""
    width, wide = 80, 24

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight, norm, above = normal(tokens, K), normal(width, K) / 8, normal(width), normal(2 * wide, width) / 8
    hidden, counters = normal(tokens, width), torch.zeros(64, dtype=torch.int32, device=device)
    exact = hidden.double() + _exact(x, weight, None, None, False)
    config, following = Tiling(32, 32, 4, 2, parts, tokens=together), Tiling(16, 16, 4, 2, 1, tokens=together)
    left = Prenormed.empty(hidden, config.blocks(width), EPS)
    assert left.parts == 3
    matvec(x, weight, residual=hidden, next_norm=norm, prenormed=left, counters=counters, config=config)
    close(hidden, exact, dtype)
    rounded = (hidden.double() * norm.double()).to(dtype).double()  # as it is multiplied
    scale = torch.rsqrt(hidden.double().pow(2).mean(1, keepdim=True) + EPS)
    close(matvec(left, above, swiglu=True, config=following), _exact(rounded * scale, above, None, None, True), dtype)
    assert not counters.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
def test_the_fixed_choice(device: str, dtype: torch.dtype, tokens: int) -> None:
    x, weight = torch.randn(tokens, 512, device=device).to(dtype), torch.randn(10, 512, device=device).to(dtype)
    close(matvec(x, weight), _exact(x, weight, None, None, False), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_the_same_in_any_batch_of_its_kernel(device: str) -> None:
    x, weight = torch.randn(16, K, device=device).half(), torch.randn(N, K, device=device).half()
    norm = torch.randn(K, device=device).half()

    def rows(tokens: int, config: Tiling) -> Tensor:
        return matvec(x[-tokens:], weight, norm_weight=norm, eps=EPS, config=config)[-1]

    for config, counts in (
        (Tiling(8, 64, 4), (1, 2, 3, STREAM_TOKENS, 7)),
        (CONFIGS["tensor cores"], (9, 16)),
    ):
        first, *rest = (rows(tokens, config) for tokens in counts)
        assert all(torch.equal(first, other) for other in rest)


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be(device: str) -> None:
    x, weight = torch.randn(MOST_TOKENS + 1, 32, device=device), torch.randn(8, 32, device=device)
    with pytest.raises(ValueError, match="257 tokens are more than the 256"):
        matvec(x, weight)
    residual = torch.zeros(1, 4, device=device)
    with pytest.raises(ValueError, match="swiglu"):
        matvec(x[:1], weight, residual=residual, swiglu=True)
    assert matvec(x[:0], weight).shape == (0, 8)
    left = Prenormed.empty(x[:1], 1, EPS)
    with pytest.raises(ValueError, match="tiles"):
        matvec(left, weight, config=Tiling(8, 32, 4))
    with pytest.raises(ValueError, match="together"):
        matvec(x[:1], weight, prenormed=left, config=Tiling(16, 32, 4, 2, 1))


def test_every_choice_covers_its_matrix() -> None:
    for n, k in ((4096, 1024), (1024, 2048), (3072, 1024), (151936, 1024), (4096, 12288), (75968, 4096), (100, 80), (8, 1544)):
        for tokens in range(1, MOST_TOKENS + 1):
            for dtype in DTYPES:
                config = choose(n, k, tokens, dtype)
                if config is None:
                    continue  # the library's
                assert not config.parts or (k // config.parts % config.columns == 0 and dtype != torch.float32)
                assert config.columns % 16 == 0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 200, MOST_TOKENS])
@pytest.mark.parametrize("pdl", [False, True])
def test_a_captured_chain_equals_the_eager_one(device: str, tokens: int, pdl: bool) -> None:
    """Products that depend on each other, launched as dependents of one another, in a graph: none may start too early."""
    width, wide = 1024, 3072
    layers = [
        (torch.randn(2 * wide, width, device=device).bfloat16() / 32, torch.randn(width, wide, device=device).bfloat16() / 64)
        for _ in range(8)
    ]
    norm = torch.ones(width, device=device).bfloat16()
    counters = torch.zeros(256, dtype=torch.int32, device=device)
    start, hidden = torch.randn(tokens, width, device=device).bfloat16(), torch.empty(tokens, width, device=device).bfloat16()

    def chain(pdl: bool) -> None:
        hidden.copy_(start)
        of_norm: Prenormed | None = None
        for up, down in layers:
            if of_norm is None:
                product = matvec(hidden, up, norm_weight=norm, eps=EPS, swiglu=True, pdl=pdl, counters=counters)
            else:
                product = matvec(of_norm, up, swiglu=True, pdl=pdl, counters=counters)
            config = choose(width, wide, tokens, hidden.dtype)
            of_norm = Prenormed.empty(hidden, config.blocks(width), EPS) if config is not None and config.tiled else None
            next_norm = None if of_norm is None else norm
            matvec(product, down, residual=hidden, next_norm=next_norm, prenormed=of_norm, pdl=pdl, counters=counters)

    chain(False)
    eager = hidden.clone()
    chain(pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(pdl)
    for _ in range(20):
        graph.replay()
        assert torch.equal(hidden, eager)
