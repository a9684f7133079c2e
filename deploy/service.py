"""One model behind every door: HTTP, gRPC and batch parse their own words, then all call `Service`.

    door ──prompt, params──▶ generate ──▶ FrontEnd ──Submit──▶ scheduler
    door ◀──OutputDelta───── generate ◀── FrontEnd ◀─Deltas───

Runs on one event loop; the front end's threads do the detokenising. Imports no ray: how the cluster is reached comes from
outside as a `Cluster`.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.engine import Engine, EngineError, OnDeltas, OnFailure
from deploy.errors import Fault, RequestError
from deploy.frontend import FrontEnd, Generation
from deploy.outputs import OutputDelta
from deploy.prompts import ModelLimits, Prompt, PromptError, PromptParser, Source, read_model_limits
from deploy.text import Tokenizer
from scheduler.sampling import SamplingParams
from scheduler.stats import ClusterStatus

logger = logging.getLogger(__name__)

LONG_TEXT_CHARACTERS = 8192
"""Text that is tokenised in a thread, so that the event loop does not stand still."""

RECONNECT_S = 0.5


class Cluster(Protocol):
    """The scheduler as a replica reaches it."""

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
        """A new stream to the scheduler that is up now; called from a thread. Errors: EngineError, OSError while there
        is none."""
        ...

    async def status(self, maps: bool = False) -> ClusterStatus:
        """The whole cluster at this moment; maps: with the state of every block. Never raises: what cannot be reached
        is reported as not ready."""
        ...


@dataclass(frozen=True, slots=True)
class Observation:
    """One request that has ended, for metrics, logs and traces. Seconds by this process's monotonic clock.

    outcome: "stop", "length", "abort", or the name of a `Fault` in lower case. ttft_s: None if no token came.
    queued_s: until its first start, by the scheduler's clock. output_tokens: of all choices.
    """

    request_id: str
    outcome: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    started_unix_s: float
    queued_s: float
    ttft_s: float | None
    e2e_s: float
    preemptions: int
    priority: int
    message: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None below two tokens."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


Observe = Callable[[Observation], None]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a door must know of the checkpoint. created: seconds since 1970."""

    name: str
    checkpoint: Path
    created: int
    limits: ModelLimits
    tokenizer: Tokenizer | None

    @classmethod
    def read(cls, name: str, checkpoint: Path, max_model_len: int | None, tensor_parallel_size: int = 1) -> "ServedModel":
        """Errors: ValueError, OSError."""
        limits = read_model_limits(checkpoint, max_model_len, tensor_parallel_size)
        created = int((checkpoint / "config.json").stat().st_mtime)
        return cls(name, checkpoint, created, limits, Tokenizer.load(checkpoint))


class Service:
    """Requests of this process on one cluster. Its methods belong to the event loop on which `run` runs.

    observe: told of every request that has ended.
    """

    def __init__(self, model: ServedModel, cluster: Cluster, observe: Observe = lambda _: None) -> None:
        self.model = model
        self.cluster = cluster
        self.parser = PromptParser(model.limits, model.tokenizer)
        self._observe = observe
        self._frontend: FrontEnd | None = None
        self._lost = asyncio.Event()
        self._waiters: dict[int, asyncio.Event] = {}
        self._grown: deque[Generation] = deque()
        self._waking = False
        self.under_way = 0
        """Requests that have not ended."""

    # ---- the connection ----

    async def run(self) -> None:
        """Keeps a stream to the scheduler open until cancelled; a lost one is replaced, its requests have failed."""
        try:
            while True:
                with contextlib.suppress(EngineError, OSError):
                    await self._connect()
                    await self._lost.wait()
                    logger.warning("the stream to the scheduler was lost; connecting anew")
                await self._disconnect()
                await asyncio.sleep(RECONNECT_S)
        finally:
            await self._disconnect()

    @property
    def connected(self) -> bool:
        return self._frontend is not None

    async def ready(self) -> bool:
        """At least one group is up, and this process reaches the scheduler."""
        return self.connected and (await self.cluster.status()).ready

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._lost.clear()

        def start(on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
            def failed(reason: str) -> None:
                on_failure(reason)
                with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody connects anew
                    loop.call_soon_threadsafe(self._lost.set)

            return self.cluster.connect(on_deltas, failed)

        self._frontend = await asyncio.to_thread(FrontEnd, start, self.model.limits, self.model.tokenizer)

    async def _disconnect(self) -> None:
        frontend, self._frontend = self._frontend, None
        if frontend is not None:
            await asyncio.to_thread(frontend.close)

    # ---- requests ----

    async def prompt(self, source: Source) -> Prompt:
        """Parses one source. Errors: PromptError."""
        text = source if isinstance(source, str) else ""
        if len(text) > LONG_TEXT_CHARACTERS or not isinstance(source, str | list):
            return await asyncio.to_thread(self.parser.parse, source)
        return self.parser.parse(source)

    async def generate(
        self,
        prompts: Sequence[tuple[Prompt, SamplingParams]],
        *,
        request_id: str,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[tuple[int, OutputDelta]]:
        """Yields (position of the prompt, what is new of it) until every choice has ended.

        Tokens that came while the caller was busy are merged. Closing the iterator or cancelling aborts what is under way.
        Errors: RequestError, once and for the whole request, the first fault of any choice; PromptError for sampling
        parameters that do not fit the model.
        """
        frontend = self._frontend
        if frontend is None:
            raise RequestError(
                Fault.UNAVAILABLE, "no scheduler can be reached yet: the cluster is starting", retry_after_s=1.0
            )
        valid = [(prompt, self.parser.params(params)) for prompt, params in prompts]
        log = _RequestLog(request_id, priority, [prompt for prompt, _ in valid])
        grown = asyncio.Event()
        self.under_way += 1
        generations: list[Generation] = []
        try:
            generations = self._submit(frontend, valid, priority, grown)
            async with asyncio.timeout(timeout_s):
                async for position, delta in self._follow(generations, grown):
                    log.take(delta)
                    yield position, delta
        except TimeoutError:
            raise log.fail(
                RequestError(Fault.TIMED_OUT, f"the request did not end within {timeout_s:g} s", code="deadline_exceeded")
            ) from None
        except RequestError as error:
            raise log.fail(error) from None
        except EngineError as error:
            raise log.fail(RequestError(Fault.UNAVAILABLE, str(error), retry_after_s=1.0)) from error
        finally:
            self.under_way -= 1
            for generation in generations:
                self._waiters.pop(id(generation), None)
            frontend.abort(generations)
            self._observe(log.end())

    def _submit(
        self, frontend: FrontEnd, prompts: Sequence[tuple[Prompt, SamplingParams]], priority: int, grown: asyncio.Event
    ) -> list[Generation]:
        loop = asyncio.get_running_loop()

        def notify(generation: Generation) -> None:
            """From the front end's thread: one wake-up of the loop for all that has grown since it last ran."""
            self._grown.append(generation)
            if not self._waking:
                self._waking = True
                loop.call_soon_threadsafe(self._wake)

        generations = frontend.submit(prompts, notify, priority=priority)
        for generation in generations:
            self._waiters[id(generation)] = grown
        return generations

    def _wake(self) -> None:
        self._waking = False
        while self._grown:
            waiter = self._waiters.get(id(self._grown.popleft()))
            if waiter is not None:
                waiter.set()

    async def _follow(
        self, generations: Sequence[Generation], grown: asyncio.Event
    ) -> AsyncIterator[tuple[int, OutputDelta]]:
        live = dict(enumerate(generations))
        while live:
            await grown.wait()
            grown.clear()
            for position, generation in list(live.items()):
                delta = generation.take_delta()
                if delta is None:
                    continue
                if delta.failed is not None:
                    raise RequestError.of_end(delta.failed)
                if delta.finished:
                    del live[position]
                yield position, delta

    async def text_of(self, tokens: Sequence[int]) -> str:
        """Errors: PromptError without a tokenizer."""
        if self.model.tokenizer is None:
            raise PromptError("this checkpoint has no tokenizer")
        return self.model.tokenizer.decode(tokens)


class _RequestLog:
    """Gathers the one `Observation` of a request."""

    def __init__(self, request_id: str, priority: int, prompts: Sequence[Prompt]) -> None:
        self._id = request_id
        self._priority = priority
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._started_unix_s = time.time()
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._tokens = self._cached = self._preemptions = 0
        self._queued_s = 0.0
        self._outcome, self._message = "abort", ""

    def take(self, delta: OutputDelta) -> None:
        if self._first_s is None and any(choice.token_ids for choice in delta.choices):
            self._first_s = time.monotonic()
        for choice in delta.choices:
            self._tokens += len(choice.token_ids)
        for finished in delta.ends:
            self._preemptions += finished.preemptions
            self._queued_s = max(self._queued_s, finished.queued_s)
        if delta.finished:
            self._cached += delta.cached_tokens or 0
            self._outcome = next((c.finish_reason for c in reversed(delta.choices) if c.finish_reason), "stop")

    def fail(self, error: RequestError) -> RequestError:
        self._outcome, self._message = error.fault.name.lower(), error.message
        return error

    def end(self) -> Observation:
        first_s = None if self._first_s is None else self._first_s - self._started_s
        return Observation(
            self._id, self._outcome, self._prompt_tokens, self._cached, self._tokens, self._started_unix_s, self._queued_s,
            first_s, time.monotonic() - self._started_s, self._preemptions, self._priority, self._message,
        )  # fmt: skip
