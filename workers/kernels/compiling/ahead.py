"""Compiles kernels before they are needed, all at once, on as many cores as there are. Imports triton.

A kernel is compiled when it is first launched, a second or two each, one after another: some forty of them are most of a cold
start. Here the very code that will launch them runs once without launching, and each kernel that it would have launched is
given to a thread of a pool. The compiler holds Python's lock for most of its time, so a thread has a process compile it, where
there are any (`pool`), and then takes it from Triton's cache.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from workers.kernels.compiling.pool import CompilePool
from workers.kernels.compiling.worker import Told

logger = logging.getLogger(__name__)

MOST_THREADS = 16

_ONE_AT_A_TIME = threading.Lock()


def can_compile_ahead() -> bool:
    """An older Triton, as 3.4, compiles at the first launch."""
    return not knobs.runtime.interpret and hasattr(JITFunction, "_do_compile")


@contextmanager
def compiling_ahead(processes: CompilePool | None = None) -> Iterator[None]:
    """Inside, launches of Triton kernels launch nothing and begin to compile what is missing; the end waits for all of it.

    What torch launches runs all the same, on whatever stands in the buffers. Launches of other threads are what they were; a
    second thread that comes to compile waits for the first. processes: compile what threads of this one would.
    """
    if not can_compile_ahead():
        yield
        return
    own = max(1, min(MOST_THREADS, (os.cpu_count() or 1) - 1))
    threads = processes.size if processes is not None and processes.size else own
    begun: dict[tuple[Any, str], Future[bool]] = {}
    with _ONE_AT_A_TIME, ThreadPoolExecutor(threads, thread_name_prefix="manta-compile") as pool:
        launch, compile_now = JITFunction.run, JITFunction._do_compile
        ours, begun_s = threading.get_ident(), time.monotonic()

        def launch_nothing(self: Any, *args: Any, **kwargs: Any) -> Any:
            ahead = {"warmup": True} if threading.get_ident() == ours else {}
            return launch(self, *args, **kwargs | ahead)

        def compile_beside(
            self: Any, key: str, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: bool
        ) -> Any:  # fmt: skip
            compile_here = partial(compile_now, self, key, signature, device, constexprs, options, attrs, warmup)
            if threading.get_ident() != ours:
                return compile_here()
            if (self, key) not in begun:
                told = Told(self, signature, constexprs, attrs, self.device_caches[device][2], options.__dict__)
                begun[self, key] = pool.submit(_provide, told, options, processes, compile_here)
            return None

        JITFunction.run, JITFunction._do_compile = launch_nothing, compile_beside
        try:
            yield
        finally:
            JITFunction.run, JITFunction._do_compile = launch, compile_now
    missing = sum(kernel.result() for kernel in begun.values())
    if missing:
        logger.info("%d kernels compiled in %.1f s, %d found", missing, time.monotonic() - begun_s, len(begun) - missing)


def _provide(told: Told, options: Any, processes: CompilePool | None, compile_here: Callable[[], Any]) -> bool:
    """Makes it one that can be launched; returns whether it was missing. options: as the backend has parsed them."""
    try:
        missing = not _cached(told, options)
        if missing and processes is not None:
            processes.compile(told)
        kernel = compile_here()
        if missing and kernel is not None:  # in Triton 3.6 what launches it is C, which the first launch would compile
            driver.active.launcher_cls(kernel.src, kernel.metadata)
    except Exception:  # nothing of this is needed to launch it, which compiles it itself, and says what is wrong with it
        logger.warning("a kernel could not be compiled ahead: %s", told.function, exc_info=True)
        return True
    return missing


def _cached(told: Told, options: Any) -> bool:
    """Whether `triton.compile` will find it."""
    from triton.runtime.cache import get_cache_key  # an older Triton, which never comes here, has none

    key = get_cache_key(told.source, make_backend(told.target), options, get_cache_invalidating_env_vars())
    name = f"{told.source.name[:150]}.json"
    return name in (get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name) or {})
