"""One model behind every door: HTTP, gRPC and batch read their own words, then all call `Service`.

    door ──content, params, terms──▶ prompt ──Prompt──▶ door
    door ──Prompts──▶ generate ──▶ FrontEnd ──Submit──▶ scheduler
    door ◀─OutputDelta── generate ◀── FrontEnd ◀─Deltas───

Runs on one event loop; the front end's threads do the detokenising. Imports no ray: how the cluster is reached comes from
outside as a `Cluster`.
"""

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster.engine import EngineError
from deploy.frontend.clusters import Cluster
from deploy.frontend.errors import DEADLINE_EXCEEDED, Fault, RequestError
from deploy.frontend.frontend import FrontEnd
from deploy.frontend.generation.choice import Told
from deploy.frontend.generation.generation import Generation
from deploy.frontend.outputs import OutputDelta
from deploy.frontend.scoring import NO_HEAD
from deploy.frontend.service.holding import HeldLogprobs, HeldNumbers, of_prompts
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.observation import Observe, RequestRecord
from deploy.text.content import Content, PromptError
from deploy.text.prompts import (
    USUAL_PARAMS,
    USUAL_TERMS,
    Prompt,
    PromptParser,
    Terms,
)
from deploy.text.tokenising import Tokenising, is_long
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import Pooling, TalliedMetric
from scheduler.protocol.sampling import SamplingParams

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5
READY_TIMEOUT_S = 2.0
MOST_WAITING = 4096
"""Requests under way in this process beyond which none waits for a scheduler that is being replaced."""

MOST_UNREAD = 4096
"""Tokens of a choice that wait for a client to read them: minutes of it at a reader's pace, some ten kilobytes of text."""


class Service:
    """Requests of this process on one cluster. Its methods belong to the event loop on which `run` runs.

    observe: told of every request that has ended. beside: the service of the model beside which this one is an adapter: its
    cluster and its connection are this one's as well, and so is the account of what is under way.
    """

    def __init__(
        self, model: ServedModel, cluster: Cluster, observe: Observe = lambda _: None, beside: "Service | None" = None
    ) -> None:  # fmt: skip
        self.model = model
        self.cluster = cluster
        self.parser = PromptParser(model.limits, model.tokenizer, model.adapter)
        self._observe = observe
        self._shared: _Shared = beside._shared if beside is not None else _Shared()
        self._grown: deque[_Call] = deque()
        self._waking = False
        self.logprobs, self.numbers = self._shared.logprobs, self._shared.numbers

    def adapted(self, model: ServedModel) -> "Service":
        """The same for an adapter beside this model."""
        return Service(model, self.cluster, self._observe, self)

    @property
    def under_way(self) -> int:
        """Requests that have not ended, those of adapters included."""
        return self._shared.under_way

    @property
    def _frontend(self) -> FrontEnd | None:
        return self._shared.frontend

    # ---- the connection ----

    async def run(self) -> None:
        """Connects, and stays connected until cancelled: a scheduler that is lost is replaced, and requests go on with the next
        one."""
        try:
            while self._frontend is None:
                with contextlib.suppress(EngineError, OSError):
                    self._shared.frontend = await self._connect()
                    break
                await asyncio.sleep(RECONNECT_S)
            await asyncio.Event().wait()
        finally:
            if self._frontend is not None:
                await asyncio.to_thread(self._frontend.close)

    async def _connect(self) -> FrontEnd:
        """Errors: EngineError, OSError while there is no scheduler."""
        connect = partial(FrontEnd, self.cluster.connect, self.model.limits, self.model.tokenizer, MOST_UNREAD)
        connecting = asyncio.get_running_loop().run_in_executor(None, connect)
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_late)  # a thread cannot be cancelled
            raise

    def tally(self, metrics: Sequence[TalliedMetric]) -> bool:
        """Hands metrics to the scheduler; False, and they are still the caller's, while it cannot be reached."""
        if self._frontend is None:
            return False
        try:
            self._frontend.tally(metrics)
        except EngineError:
            return False
        return True

    @property
    def connected(self) -> bool:
        return self._frontend is not None and self._frontend.connected

    async def ready(self) -> bool:
        """At least one group is up, and this process reaches the scheduler."""
        return await self.obstacle() is None

    async def obstacle(self) -> str | None:
        """Why this process takes no requests now; None: it takes them. Whatever the cluster does, the answer comes within
        `READY_TIMEOUT_S`: whoever asks takes a late one for none."""
        if not self.connected:
            return "no scheduler can be reached yet: the cluster is starting, or comes up anew"
        asked = asyncio.create_task(self.cluster.status())
        try:
            await asyncio.wait((asked,), timeout=READY_TIMEOUT_S)  # one that does not let itself be cancelled is left alone
            if not asked.done():
                return f"the cluster has not said within {READY_TIMEOUT_S:g} s how it is"
            status = asked.result()
        finally:
            asked.cancel()
        return None if status.obstacle is None else f"no group takes requests: {status.obstacle}"

    # ---- requests ----

    async def prompt(
        self, content: Content, params: SamplingParams = USUAL_PARAMS, terms: Terms = USUAL_TERMS
    ) -> Prompt:  # fmt: skip
        """As `parser.prompt`; text off the event loop, where it may have to wait for others. Errors: PromptError."""
        if isinstance(content, list):
            return self.parser.prompt(content, params, terms)
        return await self._shared.tokenising.run(partial(self.parser.prompt, content, params, terms), long=is_long(content))

    async def pooled_prompt(self, content: Content, pooling: Pooling, terms: Terms = USUAL_TERMS) -> Prompt:
        """As `parser.pooled`; otherwise as `prompt`. Errors: PromptError."""
        if isinstance(content, list):
            return self.parser.pooled(content, pooling, terms)
        return await self._shared.tokenising.run(partial(self.parser.pooled, content, pooling, terms), long=is_long(content))

    async def generate(
        self, prompts: Sequence[Prompt], *, request_id: str, traceparent: str | None = None,
        told: Sequence[Sequence[Told]] = (), gathered: bool = False,
    ) -> AsyncGenerator[tuple[int, OutputDelta], None]:  # fmt: skip
        """Yields (position of the prompt, what is new of it) until every choice has ended.

        Tokens that came while the caller was busy are merged. Closing the iterator or cancelling aborts what is under way.
        prompts: of one request, hence on the same terms. told: what the caller has of each choice of each prompt, from an
        earlier run with the same seeds. gathered: the caller keeps the log-probabilities until the end.
        The scheduler knows of the deadline too, so that a request is refused early if its turn would come too late.
        Errors: RequestError, once and for the whole request, the first fault of any choice.
        """
        if not self.model.uses.generates and any(prompt.pooling is None for prompt in prompts):
            raise RequestError.invalid(NO_HEAD, "model")
        log = RequestRecord(request_id, traceparent, prompts)
        call = _Call(prompts[0].terms.tenant)
        deadline = call.end_after(prompts[0].terms.deadline_s)
        account, kept = self.logprobs.account(), self.logprobs.account()
        self._shared.under_way += 1
        self._shared.calls.setdefault(request_id, []).append(call)
        try:
            account.add(of_prompts(prompts), "prompt_logprobs")
            self._submit(call, prompts, told)
            async for position, delta in self._follow(call):
                log.take(position, delta)
                if gathered:
                    kept.add(delta.logprobs, "logprobs")
                yield position, delta
        except RequestError as error:
            raise log.fail(error) from None
        except EngineError as error:
            raise log.fail(RequestError(Fault.UNAVAILABLE, str(error))) from error
        finally:
            account.close()
            kept.close()
            self._shared.under_way -= 1
            if deadline is not None:
                deadline.cancel()
            self._forget(request_id, call)
            call.abort()
            self._observe(log.end(call.generations, call.frontend.engine.block_size if call.frontend is not None else 0))

    def abort(self, request_id: str, tenant: str = "") -> int:
        """Ends the requests of this id as CANCELLED, at once. tenant: only its own; "" for everybody's. Returns how many there
        were in this process."""
        calls = [call for call in self._shared.calls.get(request_id, ()) if tenant in ("", call.tenant)]
        for call in calls:
            call.end(RequestError(Fault.CANCELLED, f"the request {request_id!r} was aborted by its id", code="aborted"))
        return len(calls)

    def end_all(self) -> None:
        """The endpoint ends: so does everything that is under way, at once, and is told why."""
        error = RequestError(Fault.UNAVAILABLE, "the endpoint is ending: ask again once it is back")
        for call in [call for calls in self._shared.calls.values() for call in calls]:
            call.end(error)

    def _submit(self, call: "_Call", prompts: Sequence[Prompt], told: Sequence[Sequence[Told]]) -> None:
        """To the scheduler that is up, or will be. Errors: RequestError, EngineError."""
        loop, frontend = asyncio.get_running_loop(), self._frontend
        if frontend is None:
            raise RequestError(Fault.UNAVAILABLE, "no scheduler can be reached yet: the cluster is starting")
        if not frontend.connected and self.under_way > MOST_WAITING:
            waiting = f"no scheduler can be reached, and {self.under_way} requests are under way"
            raise RequestError(Fault.UNAVAILABLE, waiting)

        def notify(_: Generation) -> None:
            """From the front end's thread: one wake-up of the loop for all that has grown since it last ran."""
            self._grown.append(call)
            if not self._waking:
                self._waking = True
                with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
                    loop.call_soon_threadsafe(self._wake)

        call.generations = frontend.submit(prompts, notify, told=told)
        call.frontend = frontend

    def _forget(self, request_id: str, call: "_Call") -> None:
        calls = self._shared.calls[request_id]
        calls.remove(call)
        if not calls:
            del self._shared.calls[request_id]

    def _wake(self) -> None:
        self._waking = False
        while self._grown:
            self._grown.popleft().grown.set()

    async def _follow(self, call: "_Call") -> AsyncIterator[tuple[int, OutputDelta]]:
        live = dict(enumerate(call.generations))
        while live:
            await call.grown.wait()
            call.grown.clear()
            if call.error is not None:
                raise call.error
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
        tokenizer = self._need_tokenizer()
        return await self._shared.tokenising.run(partial(tokenizer.decode, tokens), long=is_long(tokens))

    async def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Each token of a text. Errors: PromptError without a tokenizer."""
        tokenizer = self._need_tokenizer()
        return await self._shared.tokenising.run(partial(tokenizer.token_texts, tokens), long=is_long(tokens))

    def _need_tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise PromptError("this checkpoint has no tokenizer")
        return self.model.tokenizer


def _close_late(connecting: "asyncio.Future[FrontEnd]") -> None:
    """The scheduler would wait for a front end that nobody has any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        threading.Thread(target=connecting.result().close, name="manta-frontend-close", daemon=True).start()


@dataclass(slots=True, eq=False)
class _Shared:
    """What a model and the adapters beside it have in common. frontend: None before the first scheduler. calls: by request id.
    """

    frontend: FrontEnd | None = None
    tokenising: Tokenising = field(default_factory=Tokenising)
    calls: "dict[str, list[_Call]]" = field(default_factory=dict)
    logprobs: HeldLogprobs = field(default_factory=HeldLogprobs)
    numbers: HeldNumbers = field(default_factory=HeldNumbers)
    under_way: int = 0


@dataclass(slots=True, eq=False)
class _Call:
    """A request under way. It can be ended from outside while its caller is busy with something else: no task is
    cancelled, since a task that is in the midst of a caller's write would take that for a client that went away."""

    tenant: str
    frontend: FrontEnd | None = None
    generations: Sequence[Generation] = ()
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    error: RequestError | None = None

    def end(self, error: RequestError) -> None:
        """The caller learns of it when it next asks; the cluster at once."""
        if self.error is None:
            self.error = error
            self.grown.set()
            self.abort()

    def abort(self) -> None:
        """What of it has not ended."""
        if self.frontend is not None:
            self.frontend.abort(self.generations)

    def end_after(self, timeout_s: float) -> asyncio.TimerHandle | None:
        """None: no deadline."""
        return None if timeout_s == math.inf else asyncio.get_running_loop().call_later(timeout_s, self._expire, timeout_s)

    def _expire(self, timeout_s: float) -> None:
        self.end(RequestError(Fault.TIMED_OUT, f"the request did not end within {timeout_s:g} s", code=DEADLINE_EXCEEDED))
