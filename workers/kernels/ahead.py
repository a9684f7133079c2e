"""Compiles kernels before they are needed, all at once, on as many cores as there are. Imports triton.

A kernel is compiled when it is first launched, a second or two each, one after another: some forty of them are most of a cold
start. Here the very code that will launch them runs once without launching, and each kernel that it would have launched is
compiled by a thread of a pool; the compiler leaves Python's lock.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction

MOST_THREADS = 16

_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, launches of Triton kernels launch nothing and begin to compile what is missing; the end waits for all of it.

    What torch launches runs all the same, on whatever stands in the buffers. Launches of other threads are what they were; a
    second thread that comes to compile waits for the first.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # an older Triton compiles at the first launch
        yield
        return
    if knobs.runtime.interpret:
        yield
        return
    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) - 1))
    with _ONE_AT_A_TIME, ThreadPoolExecutor(threads, thread_name_prefix="manta-compile") as pool, AsyncCompileMode(pool):
        launch, ours = JITFunction.run, threading.get_ident()

        def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
            ahead = {"warmup": True} if threading.get_ident() == ours else {}
            return launch(self, *args, **kwargs | ahead)

        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = launch
