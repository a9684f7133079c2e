"""Waits for outputs on behalf of whoever calls, in a thread or on an event loop. Imports the front end."""

import asyncio
import contextlib
import math
import queue
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from operator import itemgetter

from deploy.frontend.frontend import FrontEnd
from deploy.frontend.generation.generation import Generation
from deploy.frontend.outputs import GenerationError, RequestOutput
from deploy.text.prompts import Prompt

CTRL_C_POLL_S = 0.2
"""A signal that comes just before a wait begins does not end it; so no wait is longer than this."""


def iterated(
    frontend: FrontEnd, prompts: Iterable[Prompt], places: Iterable[int], each_token: bool,
    refusals: Iterable[tuple[int, RequestOutput]] = (),
) -> Iterator[tuple[int, RequestOutput]]:  # fmt: skip
    """(position, output so far) whenever one has grown, until all have ended; whoever leaves before aborts the rest. places:
    positions of the prompts. refusals: of others; they are told first."""
    yield from refusals
    woken: queue.SimpleQueue[Generation] = queue.SimpleQueue()
    submitted_s = time.monotonic()
    generations = frontend.submit(prompts, woken.put, each_token)
    positions = {generation.stream: position for position, generation in zip(places, generations, strict=True)}
    due = deque(_by_deadline(generations, submitted_s))
    try:
        left = len(generations)
        while left:
            generation = _next(frontend, woken, due)
            output = generation.take()
            left -= output.finished
            yield positions[generation.stream], output
    finally:  # also when the caller leaves the loop, or Ctrl-C interrupts the wait
        frontend.abort(generations)


async def streamed(frontend: FrontEnd, prompts: Iterable[Prompt]) -> AsyncGenerator[RequestOutput, None]:
    """The first prompt's output whenever it has grown, until it has ended; it is aborted if the caller leaves before. Errors:
    GenerationError if it fails."""
    loop, grown = asyncio.get_running_loop(), asyncio.Event()
    submitted_s = loop.time()
    generations = frontend.submit(prompts, lambda _: loop.call_soon_threadsafe(grown.set))
    timers = [loop.call_at(due_s, frontend.expire, late) for due_s, late in _by_deadline(generations, submitted_s)]
    try:
        while True:
            await grown.wait()
            grown.clear()
            output = generations[0].take()
            if output.error:
                raise GenerationError.of([output])
            yield output
            if output.finished:
                return
    finally:
        for timer in timers:
            timer.cancel()
        frontend.abort(generations)


def _next(
    frontend: FrontEnd, woken: "queue.SimpleQueue[Generation]", due: deque[tuple[float, Generation]]
) -> Generation:
    """Those whose deadline passes in the meantime have grown too: by their end. The scheduler looks at deadlines when
    something happens, so a door keeps the time itself."""
    while True:
        while due and due[0][0] <= time.monotonic():
            frontend.expire(due.popleft()[1])
        wait_s = min(CTRL_C_POLL_S, due[0][0] - time.monotonic()) if due else CTRL_C_POLL_S
        with contextlib.suppress(queue.Empty):
            return woken.get(timeout=max(0.0, wait_s))


def _by_deadline(generations: Sequence[Generation], submitted_s: float) -> list[tuple[float, Generation]]:
    """(when it must have ended, the generation) of those with a deadline, the earliest first."""
    timed = [(submitted_s + generation.prompt.terms.deadline_s, generation) for generation in generations]
    return sorted((each for each in timed if each[0] < math.inf), key=itemgetter(0))
