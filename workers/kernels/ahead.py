"""Compiles kernels before they are needed, all at once, on as many cores as there are. Imports triton.

A kernel is compiled when it is first launched, a second or two each, one after another: some forty of them are most of a cold
start. Here the very code that will launch them runs once without launching, and each kernel that it would have launched is
compiled by a thread of a pool; the compiler leaves Python's lock.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction

MOST_THREADS = 16


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, launches of Triton kernels launch nothing and begin to compile what is missing; the end waits for all of it.

    What torch launches runs all the same, on whatever stands in the buffers. One thread of a process at a time.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # an older Triton compiles at the first launch
        yield
        return
    if knobs.runtime.interpret:
        yield
        return
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(self, *args, **kwargs | {"warmup": True})

    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(threads, thread_name_prefix="manta-compile") as pool, AsyncCompileMode(pool):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = launch
