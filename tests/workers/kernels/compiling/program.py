"""A process whose kernels are compiled by others, without a GPU: `test_ahead` runs it. It says what its own compiler met."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from workers.kernels.compiling.ahead import compiling_ahead
from workers.kernels.compiling.pool import CompilePool


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def add(x, y, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(y + at, mask=at < count), mask=at < count)


@triton.jit
def apply(x, scale, nothing, FUNCTION: tl.constexpr, DTYPE: tl.constexpr, PAIR: tl.constexpr, FLAG: tl.constexpr):
    if FLAG and nothing is None:
        tl.store(x, FUNCTION(tl.load(x).to(DTYPE) * scale) + PAIR[0] + PAIR[1])


def _never_found() -> Any:
    @triton.jit
    def hidden(x):
        tl.store(x, 3.0)

    return hidden


@triton.jit
def fatal(x):
    tl.store(x, 4.0)


hidden, deadly = _never_found(), fatal
del fatal


def __getattr__(name: str) -> Any:
    """Whoever looks for this kernel by its name dies of it."""
    if name == "fatal":
        os._exit(3)
    raise AttributeError(name)


class Float32:
    """A tensor, as far as a launch that launches nothing looks."""

    dtype = "float32"

    def data_ptr(self) -> int:
        return 64


class Hopper:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None: ...


X = Float32()
LAUNCHES: dict[str, Callable[[], object]] = {
    "add": lambda: add[(1,)](X, X, 5, BLOCK=16),
    "apply": lambda: apply[(1,)](X, 2.5, None, FUNCTION=twice, DTYPE=tl.float32, PAIR=(1, 2), FLAG=True, num_warps=2),
    "hidden": lambda: hidden[(1,)](X),
    "fatal": lambda: deadly[(1,)](X),
    "add more": lambda: add[(1,)](X, X, 5, BLOCK=32),
    "apply more": lambda: apply[(1,)](X, 2.5, None, FUNCTION=twice, DTYPE=tl.float32, PAIR=(3, 4), FLAG=True),
}


def compiled(pool: CompilePool, *names: str) -> dict[str, bool]:
    """What this process's compiler was asked for, and whether it found it."""
    found = {}

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found[src.name] = cache_hit

    knobs.compilation.listener = listen
    for kernel in (add, apply, hidden, deadly):
        kernel.device_caches.clear()
    with compiling_ahead(pool):
        for name in names:
            LAUNCHES[name]()
            LAUNCHES[name]()
    return found


def processes(pool: CompilePool) -> list[int]:
    assert pool._first is not None
    first = pool._first.pid
    return [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]


def main() -> None:
    driver.set_active(Hopper())
    pool = CompilePool()
    pool.size = 2
    pool.expect()
    says: dict[str, Any] = {"told": compiled(pool, "add", "apply", "hidden"), "again": compiled(pool, "add", "apply")}
    says["processes"] = processes(pool)
    says["dead"] = compiled(pool, "fatal")
    pool.close()
    says["left"] = [process for process in says["processes"] if Path(f"/proc/{process}").exists()]
    unexpected = CompilePool()
    unexpected.size = 2
    says["unexpected"] = compiled(unexpected, "add more", "apply more")
    says["processes"] += processes(unexpected)
    print(json.dumps(says), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
