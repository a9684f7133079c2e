"""Every attention backend against dense float64 attention: ragged batches, block borders, shared heads, dtypes, garbage."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from _pytest.mark import ParameterSet

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.attention import fake_flash_attn
from tests.workers.attention.attention_reference import DeviceAttention, Problem, make_problem, make_step
from tests.workers.kernels.devices import CUDA, gpu
from workers.attention.base import AttentionBackend, Chunks
from workers.attention.cpu.native import FLAGS, NativeAttention, NativeUnavailable, load_library
from workers.attention.cpu.plain import CpuAttention
from workers.attention.flash import FlashAttention, load_kernels
from workers.attention.forms import Form
from workers.attention.mixed import MixedAttention
from workers.attention.select import select_backend, select_device_backends
from workers.attention.write import TorchWriter
from workers.kernels.attention.form import Reach

TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}
CACHE = Path("~/.cache/manta").expanduser()
Forms = Sequence[Form] | None
Make = Callable[[KVPool, int, Forms], AttentionBackend]


def _torch(pool: KVPool, heads: int, forms: Forms = None) -> AttentionBackend:
    return select_backend("cpu", pool=pool, heads=heads, forms=forms, native=False)


def _native(pool: KVPool, heads: int, forms: Forms = None) -> NativeAttention:
    try:
        return NativeAttention(pool, heads, CACHE, forms)
    except NativeUnavailable as error:
        pytest.skip(f"no compiled kernels: {error}")


def _triton(pool: KVPool, heads: int, forms: Forms = None) -> AttentionBackend:
    pytest.importorskip("triton")
    from workers.attention.triton import TritonAttention

    return TritonAttention(pool, heads, forms=forms)


FINITE_GARBAGE = 3e4
"""What a GPU's pool may hold where nothing was written: flash-attn 3 multiplies it by zero, which NaN would survive."""


def _flash(pool: KVPool, heads: int, forms: Forms = None) -> AttentionBackend:
    if pool.device.type == "cuda" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    return FlashAttention(pool, load_kernels(), heads, forms)


MAKE: dict[str, Make] = {"torch": _torch, "native": _native, "triton": _triton, "flash": _flash}
DTYPES = {
    "torch": ("float64", "float32", "bfloat16", "float16"),
    "native": ("float64", "float32", "bfloat16"),
    "triton": ("float32", "bfloat16", "float16"),
    "flash": ("bfloat16", "float16"),
}


def _cases(*backends: str) -> list[ParameterSet]:
    """(backend, dtype, device): CPU backends on the CPU, kernels interpreted or faked there and real on a GPU."""
    pairs = [(backend, dtype) for backend in backends for dtype in DTYPES[backend]]
    on_cpu = [
        pytest.param(backend, dtype, "cpu", id=f"{backend}-{dtype}")
        for backend, dtype in pairs
        if backend != "triton" or not (CUDA or dtype == "bfloat16")  # the interpreter multiplies bfloat16's bits
    ]
    return on_cpu + [
        pytest.param(backend, dtype, "cuda", id=f"{backend}-{dtype}-cuda", marks=gpu)
        for backend, dtype in pairs
        if backend in ("triton", "flash")
    ]


every_backend = pytest.mark.parametrize(("backend", "dtype", "device"), _cases(*MAKE))


@pytest.fixture(autouse=True)
def flash_2(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """On a CPU flash-attn 2 is there, as a fake."""
    if "cuda" not in request.node.name:
        fake_flash_attn.install(monkeypatch, "2")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def run(make: Make, problem: Problem) -> torch.Tensor:
    backend = make(problem.pool, problem.query.shape[1], problem.forms)
    plan = backend.plan(problem.step)
    given = problem.query, problem.key, problem.value
    return backend.attend(problem.layer, *given, problem.step, plan, problem.sinks)


def check(make: Make, problem: Problem) -> None:
    """The answer is right, each new token stands in its slot, and nothing else was written."""
    pool, step, layer = problem.pool, problem.step, problem.layer
    if make is _flash and pool.device.type == "cuda":
        pool.data.nan_to_num_(FINITE_GARBAGE)
        step.block_tables.clamp_(max=pool.blocks - 1)  # its tiles may begin in the block before a window
    before = pool.data.clone()
    out = run(make, problem)
    assert out.shape == problem.query.shape
    assert out.dtype == pool.dtype
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=TOLERANCE[pool.layout.dtype], rtol=0)
    block, slot = step.slots // pool.layout.block_size, step.slots % pool.layout.block_size
    before[block, layer, 0, slot], before[block, layer, 1, slot] = problem.key, problem.value
    assert torch.equal(before.nan_to_num(7.0), pool.data.nan_to_num(7.0))


@every_backend
def test_mixed_batch_over_block_borders(backend: str, dtype: str, device: str) -> None:
    block = 256 if backend == "flash" else 16
    contexts = [1, block - 1, block, block + 1, 3 * block + 5, block - 1, block, block + 1, 2 * block + 7]
    queries = [1] * 5 + [block - 1, 2, block + 1, 20]
    layout = BlockLayout(block_size=block, layers=2, kv_heads=2, head_dim=64, dtype=dtype)
    check(MAKE[backend], make_problem(make_step(queries, contexts, block), layout, heads=4, device=device))


@every_backend
def test_blocks_of_256(backend: str, dtype: str, device: str) -> None:
    layout = BlockLayout(block_size=256, layers=2, kv_heads=1, head_dim=64, dtype=dtype)
    step = make_step([1, 1, 1, 70, 3], [255, 256, 517, 70, 258], 256)
    check(MAKE[backend], make_problem(step, layout, heads=2, device=device))


@pytest.mark.few
@every_backend
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8])
def test_query_heads_share_kv_heads(backend: str, dtype: str, device: str, group: int) -> None:
    block = 256 if backend == "flash" else 16
    layout = BlockLayout(block_size=block, layers=1, kv_heads=2, head_dim=64, dtype=dtype)
    step = make_step([1, 1, 13], [5, 35, 30], block)
    check(MAKE[backend], make_problem(step, layout, heads=2 * group, device=device))


@pytest.mark.few
@every_backend
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_sizes(backend: str, dtype: str, device: str, head_dim: int) -> None:
    block = 256 if backend == "flash" else 32
    layout = BlockLayout(block_size=block, layers=1, kv_heads=2, head_dim=head_dim, dtype=dtype)
    check(MAKE[backend], make_problem(make_step([1, 1, 9], [3, 70, 40], block), layout, heads=4, device=device))


@every_backend
@pytest.mark.parametrize("queries", [[1, 1, 1], [40, 2]], ids=["decodes", "chunks"])
def test_only_decodes_or_only_chunks(backend: str, dtype: str, device: str, queries: list[int]) -> None:
    block = 256 if backend == "flash" else 16
    layout = BlockLayout(block_size=block, layers=1, kv_heads=2, head_dim=64, dtype=dtype)
    contexts = [count + extra for count, extra in zip(queries, (0, 15, 64), strict=False)]
    check(MAKE[backend], make_problem(make_step(queries, contexts, block), layout, heads=4, device=device))


@every_backend
def test_views_of_a_fused_projection(backend: str, dtype: str, device: str) -> None:
    """Query, key and value may be slices of one [tokens, (heads + 2 kv_heads) * head_dim] tensor."""
    block = 256 if backend == "flash" else 16
    layout = BlockLayout(block_size=block, layers=1, kv_heads=2, head_dim=64, dtype=dtype)
    problem = make_problem(make_step([1, 5], [20, 21], block), layout, heads=4, device=device)
    fused = torch.cat((problem.query, problem.key, problem.value), dim=1)
    query, key, value = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    bound = MAKE[backend](problem.pool, 4, None)
    out = bound.attend(0, query, key, value, problem.step, bound.plan(problem.step))
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(("backend", "dtype", "device"), _cases("triton"))
def test_few_decodes_split_their_keys(backend: str, dtype: str, device: str) -> None:
    """One sequence so long that its keys are split, beside one that is a single block."""
    layout = BlockLayout(block_size=256, layers=1, kv_heads=1, head_dim=64, dtype=dtype)
    check(MAKE[backend], make_problem(make_step([1, 1], [1030, 3], 256), layout, heads=2, device=device))


device_backends = pytest.mark.parametrize(("backend", "dtype", "device"), _cases("triton", "flash"))


@device_backends
def test_attending_without_writing(backend: str, dtype: str, device: str) -> None:
    """Decodes and chunks by their own calls, over tables far wider than they need, into what the caller gives or into new."""
    block = 256 if backend == "flash" else 16
    layout = BlockLayout(block_size=block, layers=2, kv_heads=2, head_dim=64, dtype=dtype)
    problem = make_problem(make_step([1, 1, 9, 30], [5, block + 9, 9, block + 30], block), layout, heads=4, device=device)
    if device == "cuda" and backend == "flash":
        problem.pool.data.nan_to_num_(FINITE_GARBAGE)
    bound = cast(DeviceAttention, MAKE[backend](problem.pool, 4, None))
    run(MAKE[backend], problem)  # writes
    step, out = problem.step, torch.full_like(problem.query, float("nan"))
    tables = torch.nn.functional.pad(step.block_tables, (0, 500))
    plan = bound.plan_decode(step.context_lens[:2], 2, tables.shape[1])
    bound.decode(problem.layer, problem.query[:2], tables[:2], step.context_lens[:2], plan, out[:2])
    chunks = Chunks(step.query_starts[2:] - 2, step.context_lens[2:], tables[2:], 39, 30, block + 30)
    given = bound.plan_chunks(chunks)
    assert bound.chunks(problem.layer, problem.query[2:], given, out[2:]).data_ptr() == out[2:].data_ptr()
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=TOLERANCE[dtype], rtol=0)
    again = bound.decode(problem.layer, problem.query[:2], tables[:2], step.context_lens[:2], plan)
    assert torch.equal(again, out[:2])
    assert torch.equal(bound.chunks(problem.layer, problem.query[2:], given), out[2:])


@pytest.mark.parametrize(("backend", "dtype", "device"), _cases("triton"))
def test_more_decodes_than_reserved_make_room(backend: str, dtype: str, device: str) -> None:
    layout = BlockLayout(block_size=16, layers=1, kv_heads=1, head_dim=64, dtype=dtype)
    problem = make_problem(make_step([1] * 5, [3, 4, 5, 6, 7], 16), layout, heads=1, device=device)

    def small(pool: KVPool, heads: int, forms: Forms) -> AttentionBackend:
        from workers.attention.triton import TritonAttention

        return TritonAttention(pool, heads, max_batch=2, forms=forms)

    assert backend == "triton"
    check(small, problem)


# ---- layers of other forms --------------------------------------------------------------------------------------------

FORMS = {
    "scaled": Form(0.3),
    "window": Form(0.125, window=37),
    "window-of-one": Form(0.125, window=1),
    "window-beyond-all": Form(0.125, window=5000),
    "chunk": Form(0.125, chunk=100),
    "cap": Form(0.125, softcap=1.5),
    "sinks": Form(0.125, sinks=True),
    "all": Form(0.3, window=70, chunk=128, softcap=2.0, sinks=True),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("backend", "dtype", "device"), [*_cases("native"), *_cases("flash")[:1], *_cases("flash")[2:3]])
def test_forms(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str, device: str, form: Form) -> None:
    """The last of two layers, the first is plain; what the layer does not see has no block."""
    if device == "cpu" and backend == "flash":
        fake_flash_attn.install(monkeypatch, "4" if form.sinks else "2")
    block = 256 if backend == "flash" else 16
    layout = BlockLayout(block_size=block, layers=2, kv_heads=2, head_dim=64, dtype=dtype)
    queries, contexts = [1, 1, 1, 1, 90, 3], [1, 36, 130, 2 * block + 9, 130, 70]
    problem = make_problem(make_step(queries, contexts, block), layout, heads=6, device=device, form=form)
    if backend == "flash" and not cast(FlashAttention, _flash(problem.pool, 6, problem.forms)).takes(form):
        assert form.chunk is not None or form.sinks
        return
    check(MAKE[backend], problem)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_compiled_kernels_say_what_plain_torch_says(form: Form) -> None:
    """Plain torch reads whole blocks, which a sequence has written, from the first one that it sees."""
    layout = BlockLayout(block_size=16, layers=1, kv_heads=2, head_dim=64, dtype="float64")
    problem = make_problem(make_step([1, 1, 33], [200, 20, 90], 16), layout, heads=4, form=form)
    problem.pool.data.nan_to_num_(0.0)
    torch.testing.assert_close(run(_torch, problem), run(_native, problem), rtol=1e-12, atol=1e-12)
    check(_torch, problem)


def test_wide_scores_stay_finite() -> None:
    """Scores far apart and far from zero: the softmax must subtract the maximum, masked keys must weigh nothing."""
    layout = BlockLayout(block_size=16, layers=1, kv_heads=1, head_dim=64, dtype="float32")
    for make in (_torch, _native):
        problem = make_problem(make_step([1, 40], [200, 90], 16), layout, heads=2)
        problem.query.mul_(100)
        assert run(make, problem).isfinite().all()


# ---- the compiled kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES["native"])
def test_a_sequence_keeps_its_bits_in_any_batch_and_on_any_threads(dtype: str) -> None:
    layout = BlockLayout(block_size=16, layers=1, kv_heads=2, head_dim=64, dtype=dtype)
    problem = make_problem(make_step([1] * 5 + [50], [300, 170, 64, 290, 210, 130], 16), layout, heads=4)
    backend = _native(problem.pool, 4)
    torch.set_num_threads(3)
    assert not backend.plan(problem.step)[Reach()].geometry.by_sequence
    together = run(_native, problem)
    torch.set_num_threads(1)
    assert backend.plan(problem.step)[Reach()].geometry.by_sequence
    assert torch.equal(run(_native, problem), together)
    alone = make_step([1], [300], 16)
    table = problem.step.host_block_tables[:1]
    alone.host_block_tables[:, :] = table[:, : alone.host_block_tables.shape[1]]
    alone.slots[:] = problem.step.slots[:1]
    out = backend.attend(0, problem.query[:1], problem.key[:1], problem.value[:1], alone, backend.plan(alone))
    assert torch.equal(out, together[:1])


def test_no_compiler_and_no_kernel_for_a_dtype_fall_back_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = KVPool(BlockLayout(block_size=16, layers=1, kv_heads=1, head_dim=64, dtype="float16"), 1, "cpu")
    assert isinstance(select_backend("cpu", pool=half, heads=1, cache_folder=tmp_path), CpuAttention)
    assert "not float16" in caplog.text
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert isinstance(select_backend("auto", pool=_pool(), heads=2, cache_folder=tmp_path), CpuAttention)
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        select_backend("cpu", pool=_pool(), heads=2, native=True, cache_folder=tmp_path)


def test_a_failing_or_silent_compiler_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, script in enumerate(("echo broken >&2; exit 1", "exit 0")):
        compiler = tmp_path / f"g++{number}"
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setattr("shutil.which", lambda _name, path=str(compiler): path)
        assert isinstance(select_backend("cpu", pool=_pool(), heads=2, cache_folder=tmp_path), CpuAttention)


@pytest.mark.slow
def test_processes_that_build_at_once_share_one_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built in haste: what is built does not matter here."""
    _native(_pool(), 2)
    quick = tuple("-O0" if flag.startswith("-O") else flag for flag in FLAGS)
    monkeypatch.setattr("workers.attention.cpu.native.FLAGS", quick)
    code = (
        f"import pathlib, sys, workers.attention.cpu.native as native; native.FLAGS = {quick!r}; "
        "native.load_library(pathlib.Path(sys.argv[1]))"
    )
    builds = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [build.wait() for build in builds] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1
    load_library(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "it was not built anew"


def test_the_kernels_bring_no_second_openmp_runtime() -> None:
    """In a process of its own: libraries of other tests bring theirs."""
    _native(_pool(), 2)
    code = (
        "import pathlib, sys, workers.attention.cpu.native as n; n.load_library(pathlib.Path(sys.argv[1])); "
        "print(pathlib.Path('/proc/self/maps').read_text())"
    )
    maps = subprocess.run([sys.executable, "-c", code, str(CACHE)], capture_output=True, text=True, check=True).stdout
    loaded = {Path(line.split()[-1]).resolve() for line in maps.splitlines() if "omp" in line}
    assert len({path for path in loaded if path.name.startswith(("libgomp", "libiomp", "libomp"))}) == 1


# ---- flash-attn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generation", "block"), [("2", 256), ("2+fa3", 16), ("3", 16), ("4", 16)])
def test_every_generation_of_flash_attn(monkeypatch: pytest.MonkeyPatch, generation: str, block: int) -> None:
    fake_flash_attn.install(monkeypatch, generation)
    layout = BlockLayout(block_size=block, layers=2, kv_heads=2, head_dim=64, dtype="bfloat16")
    for queries in ([1, 1, 9, 30], [1, 1], [9, 30]):
        step = make_step(queries, [count + 17 for count in queries], block)
        check(_flash, make_problem(step, layout, heads=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 128}, "block_size 256"),
        ({"dtype": "float32"}, "bfloat16 and float16"),
        ({"head_dim": 60}, "head_dim 60"),
    ],
)
def test_flash_attn_says_what_it_cannot_do(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashAttention(_pool(**{"block_size": 256, "dtype": "bfloat16"} | change), load_kernels(), 2)


def test_without_flash_attn_the_error_names_each_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=r"3: .*2: .*4: "):
        load_kernels()


@pytest.mark.skipif(CUDA, reason="the fake computes on a CPU")
@pytest.mark.parametrize(("generation", "taken"), [("2", {"window", "cap"}), ("4", {"window", "cap", "sinks"})])
def test_layers_that_a_generation_does_not_take_are_tritons(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, generation: str, taken: set[str]
) -> None:
    """Decodes and chunks of a model whose layers differ, each by the backend that its form asks for, and all right."""
    pytest.importorskip("triton")
    fake_flash_attn.install(monkeypatch, generation)
    layout = BlockLayout(block_size=256, layers=4, kv_heads=1, head_dim=64, dtype="float16")
    names = ["window", "cap", "sinks", "chunk"]
    for _ in names:
        names = [*names[1:], names[0]]  # the last layer is the one that is computed
        problem = make_problem(make_step([1, 1, 9], [5, 300, 280], 256), layout, heads=2, form=FORMS[names[-1]])
        step, layer, forms = problem.step, problem.layer, [FORMS[name] for name in names]
        TorchWriter(problem.pool).write(layer, problem.key, problem.value, TorchWriter(problem.pool).targets(step.slots))
        for choice in ("auto", "flash"):
            with caplog.at_level(logging.INFO):
                bound, small = select_device_backends(choice, pool=problem.pool, heads=2, most=4, forms=forms)
            assert isinstance(bound, MixedAttention)
            assert small.name == "triton"
            chunker = "flash" if names[-1] in taken else "triton"
            assert bound._chunks[layer].name == chunker
            assert bound._decodes[layer].name == ("triton" if choice == "auto" else chunker)
            plan = bound.plan_decode(step.context_lens[:2], 2, step.block_tables.shape[1])
            given = problem.query[:2], step.block_tables[:2], step.context_lens[:2]
            out = [bound.decode(layer, *given, plan, sinks=problem.sinks)]
            chunks = Chunks(step.query_starts[2:] - 2, step.context_lens[2:], step.block_tables[2:], 9, 9, 280)
            out.append(bound.chunks(layer, problem.query[2:], bound.plan_chunks(chunks), sinks=problem.sinks))
            torch.testing.assert_close(torch.cat(out).double(), problem.expected, atol=TOLERANCE["float16"], rtol=0)
    assert "triton for layers with chunks" in caplog.text
    assert ("triton for layers with attention sinks" in caplog.text) == ("sinks" not in taken)


# ---- the choice ------------------------------------------------------------------------------------------------------


def _pool(**change: object) -> KVPool:
    sizes: dict[str, object] = {"block_size": 16, "layers": 1, "kv_heads": 2, "head_dim": 64, "dtype": "float32"}
    return KVPool(BlockLayout(**(sizes | change)), 2, "cpu")  # type: ignore[arg-type]


def test_auto_on_a_cpu_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert select_backend("auto", pool=_pool(), heads=4).name == "cpu"
        assert select_backend("auto", pool=_pool(), heads=4, native=False).name == "cpu"
    assert "plain torch, as asked" in caplog.text


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [("fast", 4, "auto, flash, triton, cpu"), ("flash", 4, "needs a CUDA device"), ("triton", 4, "auto or cpu"),
     ("cpu", 5, "cannot share 2 KV heads")],
)  # fmt: skip
def test_a_choice_that_cannot_work_says_what_to_change(name: str, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_backend(name, pool=_pool(), heads=heads)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_auto_on_cuda_falls_back_to_triton_for_blocks_or_dtypes_that_flash_attn_refuses() -> None:
    layout = BlockLayout(block_size=16, layers=1, kv_heads=2, head_dim=64, dtype="float32")
    assert select_backend("auto", pool=KVPool(layout, 2, "cuda"), heads=4).name == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_decodes_replay_in_a_cuda_graph_as_contexts_grow_cuda(backend: str) -> None:
    layout = BlockLayout(block_size=256, layers=1, kv_heads=2, head_dim=64, dtype="bfloat16")
    problem = make_problem(make_step([1, 1], [300, 5], 256), layout, heads=4, device="cuda")
    problem.pool.data.nan_to_num_(FINITE_GARBAGE)
    bound = cast(DeviceAttention, MAKE[backend](problem.pool, 4, None))
    step = problem.step
    run(MAKE[backend], problem)
    lens = torch.ones_like(step.context_lens)

    def attend() -> torch.Tensor:
        plan = bound.plan_decode(lens, 2, step.block_tables.shape[1])
        return bound.decode(0, problem.query, step.block_tables, lens, plan)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    lens.copy_(step.context_lens)
    graph.replay()
    torch.testing.assert_close(out.cpu().double(), problem.expected, atol=TOLERANCE["bfloat16"], rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_chunks_replay_in_a_cuda_graph_as_their_lengths_change_cuda() -> None:
    """Captured for 64 tokens of 2 sequences, replayed for fewer: the tiles are found on the device."""
    layout = BlockLayout(block_size=64, layers=1, kv_heads=2, head_dim=64, dtype="bfloat16")
    problem = make_problem(make_step([40, 21], [140, 21], 64), layout, heads=4, device="cuda")
    step = problem.step
    bound = cast(DeviceAttention, MAKE["triton"](problem.pool, 4, None))
    run(MAKE["triton"], problem)
    starts, lens = torch.tensor([0, 32, 64], dtype=torch.int32, device="cuda"), torch.full_like(step.context_lens, 32)
    query, out = (torch.zeros((64, 4, 64), dtype=problem.pool.dtype, device="cuda") for _ in range(2))
    query[:61] = problem.query

    def attend() -> None:
        chunks = Chunks(starts, lens, step.block_tables, 64, 64, 256)
        bound.chunks(0, query, bound.plan_chunks(chunks), out)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    starts.copy_(step.query_starts)
    lens.copy_(step.context_lens)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out[:61].cpu().double(), problem.expected, atol=TOLERANCE["bfloat16"], rtol=0)
    assert not out[61:].any()
