"""The front end: submits prompts to the engine, passes what comes back on to each request, wakes whoever waits.

What a request makes of its tokens is in `generation`; one thread of this module does it, so that the engine's thread and the
callers never detokenise. Imports `generation`, the engine's interface and the wire types, no torch, no ray; used by `llm` and
`service`.
"""

import contextlib
import logging
import math
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from cluster.engine import EngineError, OnDeltas, OnFailure, RequestStream
from deploy.frontend.generation import Generation, Notify
from deploy.frontend.outputs import read_payload
from deploy.text.prompts import ModelLimits, Prompt
from deploy.text.tokenizer import Tokenizer
from kvcache.hashing import hash_blocks
from scheduler.protocol.messages import NO_TOKEN, Deltas, Failure, Finished, FinishReason, Request, TokenLogprobs

logger = logging.getLogger(__name__)


class FrontEnd:
    """The requests of this process on one engine. Every method may be called from any thread."""

    def __init__(
        self, start: Callable[[OnDeltas, OnFailure], RequestStream], limits: ModelLimits, tokenizer: Tokenizer | None,
        on_lost: Callable[[], object] = lambda: None, most_unread: float = math.inf,
    ) -> None:  # fmt: skip
        """start: brings the engine up, given the two callbacks. on_lost: called from another thread when every request has
        failed because the engine was lost; not after `close`. most_unread: tokens of a choice that its caller may leave; then
        the request ends, so that nobody who does not read is computed for."""
        self._most_unread = most_unread
        self._limits = limits
        self._tokenizer = tokenizer
        self._on_lost = on_lost
        # Guards the four below. Reentrant: a garbage collection may call `close` in the midst of anything.
        self._lock = threading.RLock()
        self._live: dict[int, Generation] = {}  # by stream
        self._next_stream = 0
        self._lost: str | None = None
        self._closed = False
        # Never full: the engine must not wait for this thread, which calls the engine. What waits here is bounded all the
        # same, by the tokens that live requests may still bring.
        self._inbox: queue.SimpleQueue[Deltas | str | None] = queue.SimpleQueue()
        self.engine = start(self._inbox.put, self._inbox.put)
        self._thread = threading.Thread(target=self._pump, name="manta-frontend", daemon=True)
        self._thread.start()

    def submit(self, prompts: Sequence[Prompt], notify: Notify, each_token: bool = True) -> list[Generation]:
        """Queues prompts. notify: called from another thread when `take` has something new: after each token, or
        only at the end.
        Errors: EngineError once the engine is lost or closed."""
        with self._lock:
            stream = self._next_stream
            self._next_stream += sum(prompt.params.n for prompt in prompts)
        generations, requests = [], []
        for prompt in prompts:
            request = self._request(stream, prompt)
            requests.append(request)
            generations.append(Generation(request, prompt, self._tokenizer, notify, each_token))
            stream += prompt.params.n
        with self._lock:
            if self._lost is not None:
                raise EngineError(self._lost)
            for generation in generations:
                self._live.update(dict.fromkeys(generation.streams, generation))
        try:
            self.engine.submit(requests)
        except BaseException:
            self._forget(generations)
            raise
        return generations

    def abort(self, generations: Iterable[Generation]) -> None:
        """Nobody waits for these any more; those that have ended are ignored."""
        self._abort(self._forget(generations))

    def expire(self, generation: Generation) -> None:
        """Its deadline has passed: what of it has not ended ends as TIMED_OUT, whether or not the scheduler answers."""
        message = f"the request did not end within {generation.prompt.terms.deadline_s:g} s"
        self._abort(self._end_failed(generation.streams, Failure.TIMED_OUT, message))

    def close(self) -> None:
        """Ends the engine; what is under way fails. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lost = self._lost or "the engine was shut down"
        try:
            self.engine.close()
        finally:
            self._inbox.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout=5.0)

    def _request(self, stream: int, prompt: Prompt) -> Request:
        """A grammar ends with the model's own end-of-sequence ids, so they stop such an output in any case."""
        params, terms = prompt.params, prompt.terms
        bare = params.ignore_eos and params.grammar is None
        stop_ids = params.stop_token_ids if bare else (*params.stop_token_ids, *self._limits.eos_ids)
        tokens = np.array(prompt.token_ids, dtype="<i4")
        hashes = np.array(hash_blocks(tokens, self.engine.block_size, terms.salt), dtype="<u8")
        return Request(
            stream=stream,
            tokens=tokens.tobytes(),
            hashes=hashes.tobytes(),
            params=params,
            stop_ids=tuple(dict.fromkeys(stop_ids)),
            salt=terms.salt,
            priority=terms.priority,
            tenant=terms.tenant,
            deadline_s=None if terms.deadline_s == math.inf else terms.deadline_s,
        )

    def _forget(self, generations: Iterable[Generation]) -> list[int]:
        with self._lock:
            streams = [stream for generation in generations for stream in generation.streams if stream in self._live]
            for stream in streams:
                del self._live[stream]
        return streams

    def _abort(self, streams: Sequence[int]) -> None:
        if streams and self._lost is None:
            self.engine.abort(streams)

    def _end_failed(self, streams: Iterable[int], failure: Failure, message: str) -> list[int]:
        """Ends those of the streams that have not ended, and wakes their callers. Returns which they were."""
        ends = (_failed(stream, failure, message) for stream in streams)
        ended = {end.stream: generation for end in ends if (generation := self._end(end)) is not None}
        self._wake(ended.values())
        return list(ended)

    def _end(self, finished: Finished) -> Generation | None:
        """None: it has ended already, or nobody waits for it."""
        with self._lock:
            generation = self._live.pop(finished.stream, None)
        if generation is not None:
            try:
                generation.end(finished)
            except Exception as error:
                generation.end(_failed(finished.stream, Failure.FAULT, _untold(error)))
                self._break(generation, error)
        return generation

    def _wake(self, generations: Iterable[Generation]) -> None:
        """Each once."""
        for generation in dict.fromkeys(generations):
            with contextlib.suppress(RuntimeError):  # the caller's event loop is closed: nobody waits
                generation.wake()

    # ---- the thread ----

    def _pump(self) -> None:
        while (event := self._inbox.get()) is not None:
            reason = event if isinstance(event, str) else self._applied(event)
            if reason is not None:
                self._fail(reason)
                if not self._closed:
                    self._on_lost()
        self._fail("the engine was shut down")

    def _applied(self, deltas: Deltas) -> str | None:
        """Applies them. Why the front end is lost, if they make no sense."""
        try:
            self._apply(deltas)
        except Exception as error:
            logger.exception("the front end failed")
            return f"the front end failed: {error}"
        return None

    def _apply(self, deltas: Deltas) -> None:
        """Extends every stream that got tokens, ends those that finished, then wakes each caller once."""
        touched: list[Generation] = []
        logprobs: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)
        for stream, payload in deltas.logprobs:
            entry = read_payload(payload)
            if isinstance(entry, TokenLogprobs):
                logprobs[stream].append(entry)
            elif (generation := self._live.get(stream)) is not None:
                touched.append(generation)
                try:
                    generation.fill_prompt(entry)
                except Exception as error:
                    self._break(generation, error)
        for stream, position, tokens in _tokens_by_stream(deltas):
            if (generation := self._live.get(stream)) is not None:
                touched.append(generation)
                try:
                    keep_tokens = generation.extend(stream, position, tokens, logprobs.get(stream, ()))
                except Exception as error:
                    self._break(generation, error)
                    continue
                if keep_tokens is not None:
                    self.engine.stop(stream, keep_tokens)
                elif generation.unread(stream) > self._most_unread:
                    message = f"nobody has read the last {generation.unread(stream)} tokens of the output: read faster"
                    self._abort(self._end_failed(generation.streams, Failure.TIMED_OUT, message))
        touched += [generation for finished in deltas.finished if (generation := self._end(finished)) is not None]
        self._wake(touched)

    def _break(self, generation: Generation, error: Exception) -> None:
        """What one request makes of its tokens has raised (a tokenizer may): it ends, and the others go on."""
        logger.error("the request of stream %d cannot be told", generation.stream, exc_info=error)
        self._abort(self._end_failed(generation.streams, Failure.FAULT, _untold(error)))

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._lost = self._lost or reason
            streams = list(self._live)
        self._end_failed(streams, Failure.UNAVAILABLE, reason)


def _failed(stream: int, failure: Failure, message: str) -> Finished:
    return Finished(stream, FinishReason.FAILED, 0, 0, message, failure)


def _untold(error: Exception) -> str:
    return f"the output cannot be told: {error}"


def _tokens_by_stream(deltas: Deltas) -> Iterator[tuple[int, int, list[int]]]:
    """(stream, how many tokens it had before, its new ones) of the streams that got any."""
    streams = np.frombuffer(deltas.streams, dtype="<i8").tolist()
    positions = (np.frombuffer(deltas.positions, dtype="<i4") + deltas.advanced).tolist()
    columns = np.frombuffer(deltas.tokens, dtype="<i4").reshape(-1, len(streams)).T.tolist() if streams else []
    for stream, position, column in zip(streams, positions, columns, strict=True):
        if tokens := [token for token in column if token != NO_TOKEN]:
            yield stream, position, tokens
