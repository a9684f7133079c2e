"""Processes that are the ranks of one group, each with a pipe. Imports the standard library only."""

import contextlib
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

END_S = 30.0
"""For a rank to end by itself, once it has been told that all is done."""


@contextlib.contextmanager
def ranks_of(size: int, run: Callable[..., None], *arguments: Any) -> Iterator[list[Connection]]:
    """Pipes to processes that do `run(rank, *arguments, pipe)`. When the body has ended each is sent a last message, for which
    ranks wait so that none leaves its group before the others have done."""
    context = get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(size):
            here, there = context.Pipe()
            processes.append(context.Process(target=run, args=(rank, *arguments, there), daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
        yield pipes
        for pipe in pipes:
            with contextlib.suppress(OSError):  # it did not wait
                pipe.send("done")
        for process in processes:
            process.join(END_S)
    finally:
        for process in processes:
            process.kill()
            process.join()
