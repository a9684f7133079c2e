"""The job itself: reads lines, keeps a bounded number of requests under way, writes each result as it comes.

    input ──read_lines──▶ parse ──Window──▶ backend.answer ──▶ journal
             (a thread)     └──── BadLine, as an error line ──────┘ (a thread)

Memory is bounded by the window, whatever the size of the files, but for a digest of each id (about 100 bytes in a set).
Imports no ray and no HTTP: who answers comes from outside.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import msgspec

from cluster.engine import EngineError
from deploy.batch.backends.backend import Backend, LineAnswer
from deploy.batch.journal import Journal
from deploy.batch.limits import Limits
from deploy.batch.lines import (
    BadLine,
    BatchRequest,
    BatchResponse,
    Line,
    LineError,
    Result,
    bad_line_id,
    encode,
    key_of,
    parse,
    read_lines,
    result_id,
)
from deploy.batch.progress import JobTally
from deploy.config.load import ConfigError
from deploy.doors.openai.errors import error_body
from deploy.frontend.errors import Fault, RequestError

logger = logging.getLogger(__name__)

READ_LINES, READ_BYTES = 1024, 1 << 20
"""What is read ahead of the requests under way."""

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0

MOST_WARNINGS = 32
"""Different ones that the log is told."""

T = TypeVar("T")


class RequestWindow:
    """Room for requests under way. One task enters, any task leaves."""

    def __init__(self, limits: Limits) -> None:
        self.requests = self.tokens = 0
        self._limits = limits
        self._left = asyncio.Event()

    async def enter(self, tokens: int) -> None:
        while self.requests and (
            self.requests >= self._limits.requests or self.tokens + tokens > self._limits.tokens
        ):
            self._left.clear()
            await self._left.wait()
        self.requests += 1
        self.tokens += tokens

    def leave(self, tokens: int) -> None:
        self.requests -= 1
        self.tokens -= tokens
        self._left.set()


class BatchJob:
    """One run over one input: `catch_up`, then `run` if anything is left. What it does not finish, the next run on the same
    journal does."""

    def __init__(self, file: BinaryIO, journal: Journal, limits: Limits, tally: JobTally) -> None:
        self._journal = journal
        self._limits = limits
        self._input: Iterator[Line] = read_lines(file, limits.line_bytes)
        self._tally = tally
        self._window = RequestWindow(limits)
        self._done: set[bytes] = set()
        self._seen: set[bytes] = set()
        self._warnings: set[str] = set()
        self._writer = ThreadPoolExecutor(1, "manta-batch-writer")

    def catch_up(self) -> bool:
        """Passes over what former runs have done, and over lines that are no requests; False if that was all: then nobody is
        needed to answer, and the output stands whole. Called first, once, before the event loop.

        Errors: ConfigError if the output holds anything else; OSError.
        """
        try:
            self._done = self._journal.done()
            for line in self._input:
                entry = self._entry(line)
                if isinstance(entry, BatchRequest):
                    self._input = itertools.chain([line], self._input)
                    self._seen.discard(_key(entry, line))
                    return True
                if entry is not None:
                    self._journal.append(self._refusal(entry, line))
            self._journal.finish()
            return False
        finally:
            self._journal.keep()

    async def run(self, backend: Backend) -> None:
        """Returns once every line of the input has its result. However it ends, every result that had come is in the journal.

        Errors: ConfigError for what the user must change, EngineError once nobody answers any more, OSError.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                async for line in self._lines():
                    await self._take(line, backend, tasks)
            await self._in_writer(self._journal.finish)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled for its sake, or say the same
        finally:
            await self._in_writer(self._journal.keep)
            self._writer.shutdown()

    async def _lines(self) -> AsyncIterator[Line]:
        while ahead := await asyncio.to_thread(_read_ahead, self._input):
            for line in ahead:
                yield line

    async def _take(self, line: Line, backend: Backend, tasks: asyncio.TaskGroup) -> None:
        entry = self._entry(line)
        if isinstance(entry, BatchRequest):
            await self._window.enter(entry.tokens)
            tasks.create_task(self._serve(entry, line.size_bytes, backend))
        elif entry is not None:
            await self._write(self._refusal(entry, line))

    def _entry(self, line: Line) -> BatchRequest | BadLine | None:
        """What has to be done for a line; None where a former run has done it. An id that the input has twice belongs to its
        first line."""
        entry = _parse(line, self._limits.line_bytes)
        key = _key(entry, line)
        if key in self._seen:
            name = (entry.custom_id or "")[:80]
            entry = BadLine("duplicate_custom_id", f"an earlier line has the custom_id {name!r} too: give each its own")
            key = _key(entry, line)
        self._seen.add(key)
        if key not in self._done:
            return entry
        self._done.discard(key)
        self._tally.skip(line.size_bytes)
        return None

    def _refusal(self, entry: BadLine, line: Line) -> bytes:
        """The result of a line that is no request."""
        self._tally.count(line.size_bytes, failed=True)
        return encode(Result(_id(entry, line), entry.custom_id, error=LineError(entry.code, entry.message, line.number)))

    async def _serve(self, request: BatchRequest, size_bytes: int, backend: Backend) -> None:
        try:
            answer = await self._answer(request, backend)
            self._tell(request.custom_id, answer.warnings)
            response = BatchResponse(answer.status, request.id, msgspec.Raw(answer.body))
            await self._write(encode(Result(request.id, request.custom_id, response)))
            self._tally.count(size_bytes, failed=answer.status >= 400, output_tokens=answer.output_tokens)
        finally:
            self._window.leave(request.tokens)

    def _tell(self, custom_id: str, warnings: tuple[str, ...]) -> None:
        """A result has no place for them: the log has, once for each."""
        for warning in warnings:
            if warning not in self._warnings and len(self._warnings) < MOST_WARNINGS:
                self._warnings.add(warning)
                logger.warning("%s, to name the first: %s", custom_id, warning)

    async def _answer(self, request: BatchRequest, backend: Backend) -> LineAnswer:
        """Waits out a full queue for as long as it takes, an absence for `retries` times. Errors: ConfigError, EngineError."""
        absences = 0
        for backoff_s in _backoffs_s():
            try:
                return await backend.answer(request)
            except RequestError as error:
                absences += error.fault is Fault.UNAVAILABLE
                if error.fault not in (Fault.OVERLOADED, Fault.UNAVAILABLE):
                    return LineAnswer(error.fault.status, error_body(error))
                if absences > self._limits.retries:
                    raise EngineError(f"{error.message} (tried {absences} times)") from error
                await asyncio.sleep(max(error.retry_after_s, backoff_s))
            except (ConfigError, EngineError):
                raise
            except Exception:
                logger.exception("request %s failed", request.id)
                fault = RequestError(Fault.INTERNAL, "a fault of Manta's: the job's log has the reason")
                return LineAnswer(500, error_body(fault))
        raise AssertionError("backoffs do not end")

    async def _write(self, result: bytes) -> None:
        """A result that has come this far is written even if the job is cancelled now."""
        writing = asyncio.ensure_future(self._in_writer(self._journal.append, result))
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # the first that fails is told, by the job
        await asyncio.shield(writing)

    async def _in_writer(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, call, *args)


def _read_ahead(lines: Iterator[Line]) -> list[Line]:
    ahead: list[Line] = []
    size = 0
    for line in itertools.islice(lines, READ_LINES):
        ahead.append(line)
        size += len(line.content)
        if size >= READ_BYTES:
            break
    return ahead


def _parse(line: Line, max_bytes: int) -> BatchRequest | BadLine:
    try:
        return parse(line, max_bytes)
    except BadLine as error:
        return error


def _id(entry: BatchRequest | BadLine, line: Line) -> str:
    return bad_line_id(line) if entry.custom_id is None else result_id(entry.custom_id)


def _key(entry: BatchRequest | BadLine, line: Line) -> bytes:
    return key_of(_id(entry, line))


def _backoffs_s() -> Iterator[float]:
    """Twice as long each time, spread out so that those who failed together do not come again together."""
    for attempt in itertools.count():
        yield min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**min(attempt, 16)) * random.uniform(0.5, 1.0)
