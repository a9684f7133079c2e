"""Every attention backend over KV in FP8: what it writes, bit by bit, and what it reads, against the format's definition."""

from typing import cast

import pytest
import torch
from _pytest.mark import ParameterSet

from kvcache.layout import FP8, BlockLayout, KVScales
from kvcache.pool import KVPool
from tests.workers.attention.attention_reference import DeviceAttention, make_step, to_device
from tests.workers.attention.fp8_reference import SCALES, NarrowProblem, codes_of, magnitudes, narrow_problem
from tests.workers.kernels.devices import CUDA, gpu
from workers.attention.base import AttentionBackend, Chunks
from workers.attention.cpu.native import NativeAttention, NativeUnavailable
from workers.attention.cpu.plain import CpuAttention
from workers.attention.cpu.varied import VariedAttention
from workers.attention.flash import FlashAttention
from workers.attention.forms import HeadShape, plain_forms
from workers.attention.select import CACHE_FOLDER, select_backend
from workers.attention.write import TorchWriter

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
DTYPES = {
    "torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "native": (torch.float64, torch.float32, torch.bfloat16),
    "varied": (torch.float64, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}


def _cases(*names: str) -> list[ParameterSet]:
    """(backend, dtype, device), as `test_attention` has them."""
    pairs = [(name, dtype, f"{name}-{dtype}".replace("torch.", "")) for name in names for dtype in DTYPES[name]]
    on_cpu = [
        pytest.param(name, dtype, "cpu", id=said)
        for name, dtype, said in pairs
        if name != "triton" or not CUDA  # its products with FP8 are in float16, which is interpreted, unlike bfloat16
    ]
    return on_cpu + [
        pytest.param(name, dtype, "cuda", id=f"{said}-cuda", marks=gpu) for name, dtype, said in pairs if name == "triton"
    ]


def bound(name: str, pool: KVPool, heads: int, dtype: torch.dtype) -> AttentionBackend:
    if name == "torch":
        return CpuAttention(pool, heads)
    if name == "native":
        try:
            return NativeAttention(pool, heads, CACHE_FOLDER.expanduser(), dtype=dtype)
        except NativeUnavailable as error:
            pytest.skip(f"no compiled kernels: {error}")
    pytest.importorskip("triton")
    from workers.attention.triton import TritonAttention

    return TritonAttention(pool, heads, dtype=dtype)


def attended(name: str, problem: NarrowProblem) -> torch.Tensor:
    heads, layout = problem.query.shape[1], problem.pool.layout
    asked = problem.query, problem.key, problem.value, problem.step
    if name == "varied":
        shape = HeadShape(heads, layout.kv_heads, layout.head_dim, layout.head_dim)
        varied = VariedAttention(problem.pool, [shape] * 2, plain_forms(2, layout.head_dim))
        return varied.attend(problem.layer, *asked, varied.plan(problem.step))
    backend = bound(name, problem.pool, heads, problem.query.dtype)
    return backend.attend(problem.layer, *asked, backend.plan(problem.step))


def check(name: str, problem: NarrowProblem) -> None:
    out = attended(name, problem)
    assert out.dtype == problem.query.dtype
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=TOLERANCE[out.dtype], rtol=0)
    assert torch.equal(problem.pool.data.view(torch.uint8).cpu(), problem.codes)


every_backend = pytest.mark.parametrize(("backend", "dtype", "device"), _cases(*DTYPES))


@every_backend
def test_mixed_batch_over_block_borders(backend: str, dtype: torch.dtype, device: str) -> None:
    layout = BlockLayout(block_size=16, layers=2, kv_heads=2, head_dim=64, dtype=FP8)
    step = make_step([1, 1, 1, 1, 15, 2, 17, 20], [1, 16, 17, 53, 15, 16, 17, 39], 16)
    check(backend, narrow_problem(step, layout, 4, dtype, device))


@every_backend
def test_heads_of_96_and_blocks_of_64(backend: str, dtype: torch.dtype, device: str) -> None:
    layout = BlockLayout(block_size=64, layers=2, kv_heads=1, head_dim=96, dtype=FP8)
    check(backend, narrow_problem(make_step([1, 1, 40], [3, 130, 70], 64), layout, 3, dtype, device))


@every_backend
def test_what_is_too_large_is_the_largest_there_is(backend: str, dtype: torch.dtype, device: str) -> None:
    """Keys and values of hundreds of times their scale: never NaN, which is what float8_e4m3fn has behind 448."""
    layout = BlockLayout(block_size=16, layers=2, kv_heads=1, head_dim=64, dtype=FP8)
    problem = narrow_problem(make_step([1, 5], [1, 5], 16), layout, 1, dtype, device, wide=200.0)
    assert (problem.codes % 128 == 126).sum() > 20
    out = attended(backend, problem)
    assert out.isfinite().all()
    assert torch.equal(problem.pool.data.view(torch.uint8).cpu(), problem.codes)


@pytest.mark.parametrize(("backend", "dtype", "device"), _cases("torch", "native", "triton"))
def test_every_number_of_the_format_is_read_as_it_is(backend: str, dtype: torch.dtype, device: str) -> None:
    """A sequence of one token attends to its own value alone: out come all 254 of them, subnormals too, times the scale."""
    layout = BlockLayout(block_size=16, layers=1, kv_heads=2, head_dim=64, dtype=FP8)
    pool = KVPool(layout, 8, device, scales=KVScales((1.0,), (0.5,)))
    value = torch.cat((magnitudes(), torch.zeros(1), -magnitudes(), torch.zeros(1))).view(2, 2, 64) / 2
    step = make_step([1, 1], [1, 1], 16)
    attention = bound(backend, pool, 2, dtype)
    value, step = value.to(dtype).to(device), to_device(step, device)
    out = attention.attend(0, torch.zeros_like(value), torch.zeros_like(value), value, step, attention.plan(step))
    assert torch.equal(out, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_between_two_of_the_format(dtype: torch.dtype) -> None:
    """The nearest, of two the even one; NaN stays NaN, infinity is 448."""
    known = magnitudes()
    between = torch.cat((known, (known[1:] + known[:-1]) / 2, known * 1.01, torch.tensor([464.0, 1e4, torch.inf, torch.nan])))
    numbers = torch.cat((between, -between)).to(dtype)
    layout = BlockLayout(block_size=16, layers=1, kv_heads=1, head_dim=1, dtype=FP8)
    for scale in (1.0, 0.25, 0.37):
        pool = KVPool(layout, 64, "cpu", scales=KVScales((scale,), (scale,)))
        writer = TorchWriter(pool)
        states = numbers.view(-1, 1, 1)
        writer.write(0, states, -states, writer.targets(torch.arange(len(numbers))))
        for cache, given in ((pool.keys(0), numbers), (pool.values(0), -numbers)):
            found = cache.view(torch.uint8).flatten()[: len(numbers)]
            known_nan = given.isnan()  # whose sign means nothing
            assert torch.equal(found[~known_nan], codes_of(given, scale)[~known_nan])
            assert (found[known_nan] % 128 == 127).all()


@pytest.mark.parametrize(("backend", "dtype", "device"), _cases("triton"))
def test_attending_without_writing(backend: str, dtype: torch.dtype, device: str) -> None:
    """Decodes and chunks by the calls of a GPU's runner: long rows, whose keys are cut, among them."""
    layout = BlockLayout(block_size=16, layers=2, kv_heads=2, head_dim=64, dtype=FP8)
    problem = narrow_problem(make_step([1, 1, 9, 30], [5, 300, 9, 46], 16), layout, 4, dtype, device)
    problem.pool.data.view(torch.uint8).copy_(problem.codes)
    attention = cast(DeviceAttention, bound(backend, problem.pool, 4, dtype))
    step, out = problem.step, torch.full_like(problem.query, float("nan"))
    plan = attention.plan_decode(step.context_lens[:2], 2)
    attention.decode(problem.layer, problem.query[:2], step.block_tables[:2], step.context_lens[:2], plan, out[:2])
    chunks = Chunks(step.query_starts[2:] - 2, step.context_lens[2:], step.block_tables[2:], 39, 30, 46)
    attention.chunks(problem.layer, problem.query[2:], attention.plan_chunks(chunks), out[2:])
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=TOLERANCE[dtype], rtol=0)


# ---- which backend, and why


def _pool(dtype: str = FP8, head_dim: int = 64) -> KVPool:
    return KVPool(BlockLayout(block_size=16, layers=1, kv_heads=1, head_dim=head_dim, dtype=dtype), 2, "cpu")


def test_a_cpu_takes_the_compiled_kernels_where_there_are_some_for_the_model(caplog: pytest.LogCaptureFixture) -> None:
    bound("native", _pool(), 1, torch.float32)  # or there are none on this machine
    assert isinstance(select_backend("auto", pool=_pool(), heads=1, dtype=torch.bfloat16), NativeAttention)
    assert isinstance(select_backend("auto", pool=_pool(), heads=1, dtype=torch.float16), CpuAttention)
    assert "not float16" in caplog.text


def test_flash_attn_refuses_fp8_by_name() -> None:
    with pytest.raises(ValueError, match="serves bfloat16 and float16, not float8_e4m3fn"):
        FlashAttention(_pool(), None, 1)  # type: ignore[arg-type]


def test_scales_belong_to_layers() -> None:
    layout = BlockLayout(block_size=16, layers=2, kv_heads=1, head_dim=16, dtype=FP8)
    assert KVPool(layout, 1, "cpu").scales(1) == (1.0, 1.0)
    assert KVPool(layout, 1, "cpu", scales=KVScales((1.0, SCALES[0]), (2.0, SCALES[1]))).scales(1) == SCALES
    assert _pool("bfloat16").scales(0) is None
