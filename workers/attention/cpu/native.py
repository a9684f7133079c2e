"""Attention on the CPU by compiled kernels: builds `native.cpp` at first use, keeps the library, calls it by ctypes.

Imports torch, numpy, the pool and the step. Raises `NativeUnavailable` where no library can be built; never crashes.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.forms import Form, plain_forms
from workers.attention.write import dense_rows, stored
from workers.kernels.attention.form import Reach
from workers.step import StepInput

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-fPIC")
BUILD_TIMEOUT_S = 120
RUN = 64  # keys of one decode task, as in native.cpp
ROWS = {torch.bfloat16: 64, torch.float32: 64, torch.float64: 32}  # query rows of one chunk tile
MAX_HEAD_DIM = 256


class NativeUnavailable(Exception):
    """The compiled kernels cannot serve here; the message says why. Plain torch can."""


class AttentionGeometry(ctypes.Structure):
    """The struct of the same name in native.cpp: sizes, then host addresses."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("threads", "heads", "kv_heads", "head_dim", "block_size", "block_stride")),
        *((name, ctypes.c_int64) for name in ("max_blocks", "tokens", "decodes", "by_sequence", "decode_tasks")),
        ("chunk_tasks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens", "query_starts", "task_starts")),
        *((name, ctypes.c_void_p) for name in ("task_sequence", "tiles", "slots", "partials")),
    ]


class AttentionForm(ctypes.Structure):
    """The struct `Form` in native.cpp."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("scale", "softcap")), *((name, ctypes.c_int64) for name in ("window", "chunk")),
        ("sinks", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step's, for the layers of one reach."""

    geometry: AttentionGeometry
    kept: tuple[object, ...]  # owners of the memory that `geometry` points to


class NativeAttention:
    """The kernels of native.cpp for one pool, and layers of any form. bf16 and float32 accumulate in float32, float64 in
    float64. A pool in FP8 is read as it is, number by number; what is written to it has been rounded here. dtype: of queries,
    None: the pool's.

    Runs on as many threads as torch is set to when a step is planned, in torch's own OpenMP pool. A sequence's result
    has the same bits whatever else is in the batch and however many threads there are.

    Raises NativeUnavailable: no compiler, a failed build, or a dtype or head_dim that the kernels do not have.
    """

    name = "cpu"

    def __init__(
        self, pool: KVPool, heads: int, cache_folder: Path, forms: Sequence[Form] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._heads = heads
        layout = pool.layout
        self._forms = forms or plain_forms(layout.layers, layout.head_dim)
        self._dtype = dtype = dtype or pool.dtype
        name = str(dtype).removeprefix("torch.")
        if dtype not in ROWS or (not layout.scaled and dtype != pool.dtype):
            raise NativeUnavailable(f"they serve bfloat16, float32 and float64, not {name}, over KV of the same type or FP8")
        if layout.head_dim % 16 or layout.head_dim > MAX_HEAD_DIM:
            raise NativeUnavailable(f"head_dim {layout.head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}")
        if heads // layout.kv_heads > ROWS[dtype]:
            raise NativeUnavailable(f"they serve at most {ROWS[dtype]} heads per KV head")
        function = load_library(cache_folder)[f"attend_{name}_fp8" if layout.scaled else f"attend_{name}"]
        pointer, stride, scale = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        function.argtypes = [
            pointer, pointer, pointer, stride, pointer, stride, pointer, stride, pointer, pointer, scale, scale, pointer,
        ]  # fmt: skip
        function.restype = None
        self._function = function
        self._keys = [pool.keys(layer).data_ptr() for layer in range(layout.layers)]
        self._values = [pool.values(layer).data_ptr() for layer in range(layout.layers)]

    def plan(self, step: StepInput) -> dict[Reach, NativePlan]:
        return {reach: self._plan(step, reach) for reach in dict.fromkeys(form.reach for form in self._forms)}

    def _plan(self, step: StepInput, reach: Reach) -> NativePlan:
        layout, decodes, threads = self._pool.layout, step.decodes, torch.get_num_threads()
        tables = np.ascontiguousarray(step.host_block_tables, np.int32)
        contexts = np.ascontiguousarray(step.host_context_lens, np.int32)
        queries = step.host_query_lens
        query_starts = _prefix_sums(queries)
        runs = -(-contexts[:decodes] // RUN) - reach.lowest(contexts[:decodes] - 1) // RUN
        task_starts = _prefix_sums(runs)
        task_sequence = np.repeat(np.arange(decodes, dtype=np.int32), runs)
        tiles = self._tiles(queries, decodes)
        partial = self._heads * (layout.head_dim + 2)
        partials = torch.empty(len(task_sequence) * partial, dtype=_accumulator(self._dtype))
        slots = step.slots.contiguous()
        geometry = AttentionGeometry(
            threads=threads,
            heads=self._heads,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            block_stride=self._pool.data.stride(0),
            max_blocks=tables.shape[1],
            tokens=len(slots),
            decodes=decodes,
            by_sequence=bool(decodes) and int(runs.max()) * 2 * threads <= len(task_sequence),  # none is a long tail
            decode_tasks=len(task_sequence),
            chunk_tasks=len(tiles),
            block_tables=tables.ctypes.data,
            context_lens=contexts.ctypes.data,
            query_starts=query_starts.ctypes.data,
            task_starts=task_starts.ctypes.data,
            task_sequence=task_sequence.ctypes.data,
            tiles=tiles.ctypes.data,
            slots=slots.data_ptr(),
            partials=partials.data_ptr(),
        )
        return NativePlan(geometry, (tables, contexts, query_starts, task_starts, task_sequence, tiles, slots, partials))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: StepInput,  # noqa: ARG002
        plan: dict[Reach, NativePlan],
        sinks: Tensor | None = None,
    ) -> Tensor:
        scales = self._pool.scales(layer)
        if scales is not None:
            key, value = stored(key, scales[0]), stored(value, scales[1])
        query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
        out = torch.empty(query.shape, dtype=query.dtype)
        form = self._forms[layer]
        assert form.sinks == (sinks is not None), "sinks come with the layers that have them"
        told = None if sinks is None else sinks.to(_accumulator(query.dtype)).contiguous()
        said = AttentionForm(form.scale, form.softcap or 0.0, *form.reach, None if told is None else told.data_ptr())
        self._function(
            ctypes.byref(plan[form.reach].geometry),
            ctypes.byref(said),
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            self._keys[layer],
            self._values[layer],
            *(scales or (1.0, 1.0)),
            out.data_ptr(),
        )
        return out

    def _tiles(self, queries: npt.NDArray[np.int32], decodes: int) -> npt.NDArray[np.int32]:
        """[tiles, 2]: sequence and first token of each tile of the chunks, the longest contexts of a chunk first."""
        tokens = ROWS[self._dtype] * self._pool.layout.kv_heads // self._heads
        tiles = [
            (seq, first)
            for seq, count in enumerate(queries[decodes:].tolist(), start=decodes)
            for first in reversed(range(0, count, tokens))
        ]
        return np.array(tiles, dtype=np.int32).reshape(-1, 2)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def load_library(cache_folder: Path) -> ctypes.CDLL:
    """Build the kernels unless `cache_folder` has them, and load them. Raises NativeUnavailable.

    The file's name is a hash of source, flags, compiler and processor, so a shared home never serves another machine's
    build. Ranks that start together may each build; each renames a whole file into place, so none loads half of one.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailable("there is no C++ compiler (g++ or c++) on the path")
    try:
        source = SOURCE.read_bytes()
        version = _run(compiler, "--version")
        key = hashlib.sha256(b"\0".join((source, " ".join(FLAGS).encode(), version, _processor()))).hexdigest()[:16]
        library = cache_folder / f"attention-{key}.so"
        if not library.exists():
            _build(compiler, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"{compiler} failed: {error.stderr.decode(errors='replace').strip()[-500:]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"building or loading native.cpp failed: {error}") from error


def _build(compiler: str, library: Path) -> None:
    """Compile with OpenMP, link without: torch has loaded an OpenMP runtime, and a second one would fight it for cores."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as draft:
        _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{draft}/native.o")
        _run(compiler, "-shared", f"{draft}/native.o", "-o", f"{draft}/native.so")
        os.replace(f"{draft}/native.so", library)


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S).stdout


def _processor() -> bytes:
    """What -march=native depends on, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return sys.platform.encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU part"))}))


def _prefix_sums(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
