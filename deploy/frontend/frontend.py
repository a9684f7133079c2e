"""The front end: submits prompts to the engine, passes what comes back on to each request, wakes whoever waits.

What a request makes of its tokens is in `generation`; one thread of this module does it, so that the engine's thread and the
callers never detokenise. Imports `generation`, the engine's interface and the wire types, no torch, no ray; used by `llm` and
`service`.
"""

import contextlib
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from cluster.engine import Connect, EngineError, EngineLost, RequestStream
from deploy.frontend.connection import EngineConnection
from deploy.frontend.generation.choice import Told
from deploy.frontend.generation.generation import Generation, Notify
from deploy.frontend.generation.submission import Submission
from deploy.frontend.outputs import read_payload
from deploy.text.prompts import ModelLimits, Prompt
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import NO_TOKEN, Deltas, Failure, Finished, FinishReason, Had, TalliedMetric, TokenLogprobs

logger = logging.getLogger(__name__)

REACH_TIMEOUT_S = 60.0
"""That a request waits for a scheduler which is being replaced, or for the engine that replaces it."""

GIVE_UP_POLL_S = 0.25

LOT_TOKENS = 8192
"""Of the prompts that the engine is told at once: a call with many begins to be computed while the rest is on its way."""

BETWEEN_LOTS_S = 50e-6
"""For the thread that writes to the scheduler: else it gets Python's lock when whoever reads the next lot has had it for 5 ms,
or happens to let go of it."""


class FrontEnd:
    """The requests of this process on one engine. Every method may be called from any thread.

    When the scheduler is lost the requests stay: once another one is up it is asked for what is missing of each, and their
    callers notice nothing but the time that it takes.
    """

    def __init__(
        self, connect: Connect, limits: ModelLimits, tokenizer: Tokenizer | None, most_unread: float = math.inf
    ) -> None:
        """connect: called at once, and from another thread each time the scheduler was lost. most_unread: tokens of a choice
        that its caller may leave; then the request ends, so that nobody who does not read is computed for.
        Errors: those of the first `connect`."""
        self._most_unread = most_unread
        self._limits = limits
        self._tokenizer = tokenizer
        # Guards the four below. Reentrant: a garbage collection may call `close` in the midst of anything.
        self._lock = threading.RLock()
        self._live: dict[int, Generation] = {}  # by stream
        self._next_stream = 0
        self._lost: str | None = None
        self._up = True
        self._connection = EngineConnection(connect)
        self._thread = threading.Thread(target=self._pump, name="manta-frontend", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> RequestStream:
        """The stream to the scheduler that is up, or was last."""
        return self._connection.stream

    @property
    def connected(self) -> bool:
        """False while the scheduler is being replaced, and once it is lost for good."""
        return self._up

    def submit(
        self, prompts: Iterable[Prompt], notify: Notify, each_token: bool = True, told: Sequence[Sequence[Told]] = ()
    ) -> list[Generation]:
        """Queues prompts, lot by lot as they are read; while the scheduler is being replaced they wait for the next one,
        `REACH_TIMEOUT_S` at most. notify: called from another thread when `take` has something new: after each token, or only
        at the end. told: what the caller has of each choice of each prompt, from an earlier run with the same seeds; nothing of
        each if he may come back for it.
        Errors: EngineError once the engine is lost for good or closed, and whatever reading the prompts raises: then those
        queued before are aborted."""
        now_s, block_size = time.monotonic(), self.engine.block_size
        generations: list[Generation] = []
        lot: list[Generation] = []
        tokens = 0
        try:
            for number, prompt in enumerate(prompts):
                before = told[number] if told else ()
                had = tuple(Had(each.tokens, each.check) for each in before)
                stream = self._new_streams(prompt.params.n)
                submission = Submission(stream, prompt, self._limits.eos_ids, block_size, now_s, had)
                lot.append(Generation(submission, prompt, self._tokenizer, notify, each_token, before))
                tokens += len(prompt.token_ids)
                if tokens >= LOT_TOKENS:
                    generations += lot
                    self._begin(lot)
                    lot, tokens = [], 0
                    time.sleep(BETWEEN_LOTS_S)
            generations += lot
            if lot:
                self._begin(lot)
        except BaseException:
            self.abort(generations)
            raise
        return generations

    def _new_streams(self, count: int) -> int:
        """The first of so many."""
        with self._lock:
            self._next_stream += count
            return self._next_stream - count

    def abort(self, generations: Iterable[Generation]) -> None:
        """Nobody waits for these any more; those that have ended are ignored."""
        self._abort(self._forget(generations))

    def expire(self, generation: Generation) -> None:
        """Its deadline has passed: what of it has not ended ends as TIMED_OUT, whether or not the scheduler answers."""
        message = f"the request did not end within {generation.prompt.terms.deadline_s:g} s"
        self._abort(self._end_failed(generation.streams, Failure.TIMED_OUT, message))

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        """Adds to the cluster's sums. Errors: EngineError while there is no scheduler: they are still the caller's."""
        if not self._up:
            raise EngineError(self._lost or "the scheduler is being replaced")
        self.engine.tally(metrics)

    def close(self) -> None:
        """Ends the engine; what is under way fails. A second call does nothing."""
        with self._lock:
            self._lost = self._lost or "the engine was shut down"
        if self._connection.close() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _begin(self, lot: Sequence[Generation]) -> None:
        """Submits them for the first time, or has them wait for the scheduler that is to come. Errors: as `submit`'s, and
        ValueError for what cannot be sent."""
        with self._lock:  # so that nobody resumes them meanwhile
            if self._lost is not None:
                raise EngineError(self._lost)
            for generation in lot:
                self._live.update(dict.fromkeys(generation.streams, generation))
            if self._up:
                with contextlib.suppress(EngineError):  # it was lost just now, which the thread is told next
                    self.engine.submit([generation.submission.request for generation in lot])
            else:  # `_resume` submits them
                for generation in lot:
                    generation.submission.wait()

    def _forget(self, generations: Iterable[Generation]) -> list[int]:
        with self._lock:
            streams = [stream for generation in generations for stream in generation.streams if stream in self._live]
            for stream in streams:
                del self._live[stream]
        return streams

    def _abort(self, streams: Sequence[int]) -> None:
        if streams and self._up:
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
        try:
            lost = self._listen()
            while lost is not None and self._regain(lost):
                lost = self._listen()
            self._fail("the engine was shut down")
        except Exception as error:  # without this thread nobody would be told anything any more
            logger.exception("the front end failed")
            self._fail(f"the front end failed: {error}")

    def _listen(self) -> str | None:
        """Until the stream is lost, and why; None: the front end is closed."""
        while (event := self._connection.receive()) is not None:
            reason = event if isinstance(event, str) else self._applied(event)
            if reason is not None:
                return reason
        return None

    def _regain(self, reason: str) -> bool:
        """The stream is lost: what is under way waits for the next one, and is asked for anew. False if there will be none."""
        logger.warning("the stream to the scheduler was lost: %s; connecting anew", reason)
        self._suspend(reason)
        try:
            self._connection.renew()
            while not self._connection.renewed(GIVE_UP_POLL_S):
                self._give_up_waiting(reason)
        except EngineLost as error:
            self._fail(reason if str(error) in reason else f"{reason}: {error}")
            return False
        self._resume()
        return True

    def _suspend(self, reason: str) -> None:
        """No scheduler has anything of the requests any more."""
        now_s = time.monotonic()
        with self._lock:
            self._up = False
            ends = [end for generation in self._generations() for end in generation.lose(reason, now_s)]
        self._wake([generation for end in ends if (generation := self._end(end)) is not None])

    def _resume(self) -> None:
        """Asks the scheduler that is up now for what is missing. Who is aborted meanwhile is told to the same one."""
        now_s, unsent = time.monotonic(), []
        with self._lock:
            for generation in self._generations():
                try:
                    self.engine.submit(generation.requests(self.engine.block_size, now_s))
                except EngineError:
                    break  # it is lost again, which the thread is told next
                except ValueError as error:
                    unsent.append((generation, str(error)))
                generation.submission.sent()
            self._up = True
            logger.warning("connected anew; %d requests go on", len(self._generations()))
        for generation, why in unsent:
            self._end_failed(generation.streams, Failure.IMPOSSIBLE, why)

    def _give_up_waiting(self, reason: str) -> None:
        """Who has waited for too long ends."""
        since_s = time.monotonic() - REACH_TIMEOUT_S
        with self._lock:
            waits = ((generation, generation.submission.waits_since_s) for generation in self._generations())
            late = [generation for generation, waits_s in waits if waits_s is not None and waits_s < since_s]
        message = f"no scheduler could be reached within {REACH_TIMEOUT_S:g} s: it is being replaced ({reason})"
        for generation in late:
            self._end_failed(generation.streams, Failure.UNAVAILABLE, message)

    def _generations(self) -> list[Generation]:
        """Those under way, each once, in the order in which they came. The lock is held."""
        return list(dict.fromkeys(self._live.values()))

    def _applied(self, deltas: Deltas) -> str | None:
        """Applies them. Why the stream is of no use any more, if they make no sense."""
        try:
            self._apply(deltas)
        except Exception as error:
            logger.exception("the front end failed")
            return f"the front end failed: {error}"
        return None

    def _apply(self, deltas: Deltas) -> None:
        """Extends every stream that got tokens, ends those that finished, then wakes each caller once."""
        touched: list[Generation] = []
        for started in deltas.started:
            if (generation := self._live.get(started.stream)) is not None:
                generation.submission.start(started)
                if started.output:
                    touched.append(generation)
                    recalled = np.frombuffer(started.output, dtype="<i4").tolist()
                    self._extend(generation, started.stream, partial(generation.recall, started.stream, recalled))
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
                more = partial(generation.extend, stream, position, tokens, logprobs.get(stream, ()))
                self._extend(generation, stream, more)
        touched += [generation for finished in deltas.finished if (generation := self._end(finished)) is not None]
        self._wake(touched)

    def _extend(self, generation: Generation, stream: int, extend: Callable[[], int | None]) -> None:
        """By new tokens; a stop string in them ends the stream."""
        try:
            keep_tokens = extend()
        except Exception as error:
            self._break(generation, error)
            return
        if keep_tokens is not None:
            self.engine.stop(stream, keep_tokens)
        elif generation.unread(stream) > self._most_unread:
            message = f"nobody has read the last {generation.unread(stream)} tokens of the output: read faster"
            self._abort(self._end_failed(generation.streams, Failure.TIMED_OUT, message))

    def _break(self, generation: Generation, error: Exception) -> None:
        """What one request makes of its tokens has raised (a tokenizer may): it ends, and the others go on."""
        logger.error("the request of stream %d cannot be told", generation.stream, exc_info=error)
        self._abort(self._end_failed(generation.streams, Failure.FAULT, _untold(error)))

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._lost, self._up = self._lost or reason, False
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
