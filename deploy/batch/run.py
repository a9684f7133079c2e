"""One run of the job: opens the files, finds who answers, goes on until the end of the input or a signal.

Imports `clusters` and `own`, or `endpoint`, whichever is to answer.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import typer

from cluster.engine import Progress
from deploy.batch.backends.backend import Backend
from deploy.batch.job import BatchJob
from deploy.batch.journal import open_journal
from deploy.batch.limits import Limits
from deploy.batch.progress import JobTally
from deploy.batch.storage import Location
from deploy.config.load import Config, ConfigError, bound_openmp_spin, read_api_keys
from deploy.terminal.display import start_progress
from deploy.terminal.exits import DONE

REPORT_S = 5.0

Open = Callable[[], AbstractAsyncContextManager[Backend]]


@dataclass(frozen=True, slots=True)
class Task:
    """What the job shall do. url, app: of a deployment that answers; neither means groups of the job's own."""

    input: Location
    output: Location
    limits: Limits
    url: str | None
    app: str | None

    def __post_init__(self) -> None:
        if str(self.input) == str(self.output):
            raise ConfigError(f"--input and --output are both {self.input}: choose another --output")
        if self.url is not None and self.app is not None:
            raise ConfigError("--url and --app exclude each other: leave one of them out")


def run(task: Task, config: Config, shown: bool) -> int:
    """Returns the exit code: DONE, or 128 and the number of the signal that ended it. What went wrong is raised.

    shown: tell on stderr how far it is.
    """
    tally = JobTally(task.input.size_bytes())
    with ExitStack() as stack:
        file = stack.enter_context(task.input.open())
        journal = stack.enter_context(closing(open_journal(task.output)))
        stack.callback(_tell_end, tally, task, shown)
        progress = stack.enter_context(start_progress(shown))
        if task.output.in_job_folder:
            progress(f"{task.output} lies where Ray unpacked this job, and goes with it: a path beyond it, or a store, lasts")
        progress(f"looking for what {task.output} has already")
        job = BatchJob(file, journal, task.limits, tally)
        if not job.catch_up():
            return DONE
        door = stack.enter_context(_find_backend(task, config, progress))
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            return asyncio.run(_until_signal(_work(job, tally, door, progress)))
        finally:
            signal.signal(signal.SIGTERM, terminate)  # the loop had it, and leaves the default behind


def _tell_end(tally: JobTally, task: Task, shown: bool) -> None:
    if shown:
        typer.echo(f"{tally.summary(time.monotonic())}; results go to {task.output}", err=True)


@contextmanager
def _find_backend(task: Task, config: Config, progress: Progress) -> Iterator[Open]:
    """Groups of the job's own start here, outside of any event loop, so that a signal ends their start too."""
    if (url := task.url) is not None:
        from deploy.batch.backends.endpoint import open_endpoint

        key = next(iter(read_api_keys(config.serve)), None)
        yield lambda: open_endpoint(url, key, task.limits.requests)
        return
    bound_openmp_spin()
    from deploy.batch.backends.clusters import open_cluster
    from deploy.batch.backends.own import open_backend

    with open_cluster(config.engine, task.app, progress) as cluster:
        yield lambda: open_backend(cluster, config)


async def _work(job: BatchJob, tally: JobTally, door: Open, progress: Progress) -> None:
    async with door() as backend:
        tally.start(time.monotonic())
        reporting = asyncio.create_task(_report(tally, progress))
        try:
            await job.run(backend)
        finally:
            reporting.cancel()
            with suppress(asyncio.CancelledError):
                await reporting


async def _report(tally: JobTally, progress: Progress) -> None:
    while True:
        await asyncio.sleep(REPORT_S)
        progress(tally.words(time.monotonic()))


async def _until_signal(work: Coroutine[Any, Any, None]) -> int:
    """The first signal ends the work tidily; further ones do not cut that short."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def stop(number: int) -> None:
        if not received and task is not None:
            task.cancel()
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        await work
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]
    return DONE
