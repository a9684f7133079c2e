"""The front end's half of a request: submits prompts, turns deltas of token ids into outputs, wakes whoever waits.

One thread of its own detokenises and looks for stop strings, so that the engine's thread and the callers never do.
Imports no torch, no ray; used by `llm` (and whatever serves requests next).
"""

import contextlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cluster.engine import EngineError, OnDeltas, OnFailure, RequestStream
from deploy.errors import RequestError
from deploy.outputs import (
    FINISH_WORDS,
    ChoiceDelta,
    CompletionOutput,
    FinishWord,
    Logprob,
    OutputDelta,
    RequestOutput,
    read_logprobs,
    read_payload,
)
from deploy.prompts import ModelLimits, Prompt
from deploy.text import Detokenizer, StopStrings, Tokenizer
from kvcache.hashing import hash_pages
from scheduler.messages import NO_TOKEN, Deltas, Failure, Finished, FinishReason, PromptLogprobs, Request, TokenLogprobs
from scheduler.sampling import SamplingParams

logger = logging.getLogger(__name__)


class Choice:
    """One stream: the tokens of one choice and their text so far. Guarded by its generation's lock."""

    def __init__(
        self, index: int, prompt: Prompt, params: SamplingParams, stop_ids: frozenset[int], tokenizer: Tokenizer | None,
        each_token: bool,
    ) -> None:  # fmt: skip
        """each_token: False where only the whole output matters; its text is then decoded once, at the end."""
        self.index = index
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.finish_reason: FinishWord | None = None
        self.stop_reason: int | str | None = None
        self.finished: Finished | None = None
        self._params = params
        self._stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.decode, prompt.token_ids) if tokenizer else None
        self._stops = StopStrings(params.stop) if params.stop else None
        self._at_once = not each_token and not params.stop
        self._shown_text = 0
        self._shown_tokens = 0
        self._told_end = False

    def extend(self, tokens: Sequence[int], logprobs: Iterable[TokenLogprobs]) -> int | None:
        """Takes the next tokens. Returns how many tokens the output keeps if a stop string was found just now."""
        entries = iter(logprobs)
        for token in tokens:
            if self.finish_reason is not None:
                return None  # a stop string was found before these tokens
            self.token_ids.append(token)
            if self.logprobs is not None and (entry := next(entries, None)) is not None:
                self.logprobs.append(read_logprobs(entry, token, self._tokenizer))
            if self._detokenizer is not None and not self._at_once and token not in self._stop_ids:
                self._show(self._detokenizer.push((token,)))
                if self.stop_reason is not None:
                    self.finish_reason = "stop"
                    return len(self.token_ids)
        return None

    def end(self, finished: Finished) -> None:
        """The stream's one end. A stop string that was found here counts, even if another end was committed first."""
        self.finished = finished
        if self.finish_reason is not None:
            return
        if self._detokenizer is not None:
            if self._at_once:
                self._show(self._detokenizer.push([token for token in self.token_ids if token not in self._stop_ids]))
            self._show(self._detokenizer.flush())
            if self._stops is not None and self.stop_reason is None:
                self.text += self._stops.flush()
        self.finish_reason = "stop" if self.stop_reason is not None else FINISH_WORDS[finished.reason]
        last = self.token_ids[-1] if self.token_ids else None
        if finished.reason is FinishReason.STOP and self.stop_reason is None and last in self._params.stop_token_ids:
            self.stop_reason = last

    @property
    def error(self) -> RequestError | None:
        """Why the choice failed, if it did."""
        failed = self.finish_reason == "error" and self.finished is not None
        return RequestError.of_end(self.finished) if failed and self.finished else None

    def take(self) -> CompletionOutput:
        """This choice as it stands; what is new counts from the previous call."""
        delta, new_tokens = self.text[self._shown_text :], len(self.token_ids) - self._shown_tokens
        self._shown_text, self._shown_tokens = len(self.text), len(self.token_ids)
        ended = self.finished is not None
        return CompletionOutput(
            self.index, self.text, self.token_ids.copy(), None if self.logprobs is None else self.logprobs.copy(),
            self.finish_reason if ended else None, self.stop_reason if ended else None, delta, new_tokens,
        )  # fmt: skip

    def take_delta(self) -> ChoiceDelta | None:
        """What is new since the previous call; None if nothing is."""
        ended = self.finished is not None
        shown_text, shown_tokens = self._shown_text, self._shown_tokens
        if len(self.text) == shown_text and len(self.token_ids) == shown_tokens and (self._told_end or not ended):
            return None
        self._shown_text, self._shown_tokens, self._told_end = len(self.text), len(self.token_ids), ended
        return ChoiceDelta(
            self.index, self.text[shown_text:], self.token_ids[shown_tokens:],
            None if self.logprobs is None else self.logprobs[shown_tokens:],
            self.finish_reason if ended else None, self.stop_reason if ended else None,
        )  # fmt: skip

    def _show(self, text: str) -> None:
        if self._stops is None:
            self.text += text
            return
        self.text += self._stops.push(text, armed=len(self.token_ids) > self._params.min_tokens)
        self.stop_reason = self._stops.found


PromptEntries = list[dict[int, Logprob] | None]


class PromptTable:
    """Log-probabilities of one prompt, filled as its chunks are computed; chunks may come twice."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer | None) -> None:
        self.entries: PromptEntries = [None] * len(prompt.token_ids)
        self._tokens = prompt.token_ids
        self._tokenizer = tokenizer
        self._known = 1  # nothing predicts the first token

    def fill(self, part: PromptLogprobs) -> None:
        for position, entry in enumerate(part.tokens, start=part.first):
            self.entries[position] = read_logprobs(entry, self._tokens[position], self._tokenizer)
        self._known = max(self._known, part.first + len(part.tokens))

    @property
    def complete(self) -> bool:
        return self._known == len(self.entries)


class Generation:
    """A request under way, as its caller holds it."""

    def __init__(
        self, stream: int, prompt: Prompt, choices: Sequence[Choice], notify: "Notify", each_token: bool
    ) -> None:
        self.stream = stream
        self.prompt = prompt
        self.lock = threading.Lock()
        self.choices = choices
        self.each_token = each_token
        self.hashes = b""
        """Of the prompt's full pages, as in `Request.hashes`."""
        self.prompt_logprobs: PromptTable | None = None
        self._notify = notify
        self._notified = False  # and not taken since
        self._done = False  # the last output was taken
        self._told_prompt = False

    @property
    def streams(self) -> range:
        """One stream number for each choice."""
        return range(self.stream, self.stream + len(self.choices))

    @property
    def finished(self) -> bool:
        """Every choice has ended."""
        return all(choice.finished is not None for choice in self.choices)

    def take(self) -> RequestOutput:
        """The request as it stands."""
        with self.lock:
            self._notified = False
            ends = [choice.finished for choice in self.choices if choice.finished is not None]
            errors = [choice.error for choice in self.choices if choice.error is not None]
            self._done = len(ends) == len(self.choices)
            return RequestOutput(
                request_id=str(self.stream),
                prompt=self.prompt.text,
                prompt_token_ids=self.prompt.token_ids,
                num_cached_tokens=ends[0].cached_tokens if ends else None,
                outputs=[choice.take() for choice in self.choices],
                finished=self._done,
                error=errors[0].message if errors else None,
                fault=errors[0].fault if errors else None,
                prompt_logprobs=table.entries if (table := self.prompt_logprobs) and table.complete else None,
            )

    def take_delta(self) -> OutputDelta | None:
        """What is new since the previous call; None if nothing is. Costs what is new, not what has come so far."""
        with self.lock:
            self._notified = False
            choices = [delta for choice in self.choices if (delta := choice.take_delta()) is not None]
            prompt = self._new_prompt_logprobs()
            if not choices and prompt is None:
                return None
            ended = [choice.finished for choice in self.choices if choice.finished is not None]
            told = {delta.index for delta in choices if delta.finish_reason is not None}
            ends = [choice.finished for choice in self.choices if choice.index in told and choice.finished is not None]
            self._done = len(ended) == len(self.choices)
            return OutputDelta(choices, self._done, ended[0].cached_tokens if ended else None, prompt, ends)

    def _new_prompt_logprobs(self) -> PromptEntries | None:
        if self._told_prompt or self.prompt_logprobs is None or not self.prompt_logprobs.complete:
            return None
        self._told_prompt = True
        return self.prompt_logprobs.entries

    def wake(self) -> None:
        """Tells the caller once until it takes: progress if it wants each token, else the end."""
        with self.lock:
            if self._notified or self._done or not (self.each_token or self.finished):
                return
            self._notified = True
        self._notify(self)


Notify = Callable[[Generation], object]


class FrontEnd:
    """The requests of this process on one engine. Every method may be called from any thread."""

    def __init__(
        self, start: Callable[[OnDeltas, OnFailure], RequestStream], limits: ModelLimits, tokenizer: Tokenizer | None
    ) -> None:
        """start: brings the engine up, given the two callbacks."""
        self._limits = limits
        self._tokenizer = tokenizer
        # Guards the four below. Reentrant: a garbage collection may call `close` in the midst of anything.
        self._lock = threading.RLock()
        self._live: dict[int, tuple[Generation, Choice]] = {}
        self._next_stream = 0
        self._lost: str | None = None
        self._closed = False
        # Never full: the engine must not wait for this thread, which calls the engine. What waits here is bounded all the
        # same, by the tokens that live requests may still bring.
        self._inbox: queue.SimpleQueue[Deltas | str | None] = queue.SimpleQueue()
        self.engine = start(self._inbox.put, self._inbox.put)
        self._thread = threading.Thread(target=self._pump, name="manta-frontend", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompts: Sequence[tuple[Prompt, SamplingParams]],
        notify: Notify,
        each_token: bool = True,
        priority: int = 0,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> list[Generation]:
        """Queues valid prompts. notify: called from another thread when `take` has something new: after each token, or
        only at the end. priority: lower goes first. tenant: on whose account. deadline_s: seconds from now within which they
        must have ended. A prompt's own tenant and deadline go before these.
        Errors: EngineError once the engine is lost or closed."""
        with self._lock:
            stream = self._next_stream
            self._next_stream += sum(params.n for _, params in prompts)
        generations, requests = [], []
        for prompt, params in prompts:
            asked = prompt.of_call(tenant, deadline_s)
            generation, request = self._prepare(stream, asked, params, notify, each_token, priority)
            generations.append(generation)
            requests.append(request)
            stream += params.n
        with self._lock:
            if self._lost is not None:
                raise EngineError(self._lost)
            for generation in generations:
                choices = ((generation, choice) for choice in generation.choices)
                self._live.update(zip(generation.streams, choices, strict=True))
        try:
            self.engine.submit(requests)
        except BaseException:
            self._forget(generations)
            raise
        return generations

    def abort(self, generations: Iterable[Generation]) -> None:
        """Nobody waits for these any more; those that have ended are ignored."""
        streams = self._forget(generations)
        if streams and self._lost is None:
            self.engine.abort(streams)

    def expire(self, generation: Generation) -> None:
        """Its deadline has passed: what of it has not ended ends as TIMED_OUT, whether or not the scheduler answers."""
        message = f"the request did not end within {generation.prompt.deadline_s:g} s"
        late = [
            stream
            for stream in generation.streams
            if self._end(Finished(stream, FinishReason.FAILED, 0, 0, message, Failure.TIMED_OUT)) is not None
        ]
        if late:
            self._wake([generation])
            if self._lost is None:
                self.engine.abort(late)

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

    def _prepare(
        self, stream: int, prompt: Prompt, params: SamplingParams, notify: Notify, each_token: bool, priority: int
    ) -> tuple[Generation, Request]:
        """A grammar ends with the model's own end-of-sequence ids, so they stop such an output in any case."""
        bare = params.ignore_eos and params.grammar is None
        stop_ids = params.stop_token_ids if bare else (*params.stop_token_ids, *self._limits.eos_ids)
        ends = frozenset(stop_ids)
        choices = [Choice(index, prompt, params, ends, self._tokenizer, each_token) for index in range(params.n)]
        tokens = np.array(prompt.token_ids, dtype="<i4")
        hashes = np.array(hash_pages(tokens, self.engine.page_size, prompt.salt), dtype="<u8")
        request = Request(
            stream=stream,
            tokens=tokens.tobytes(),
            hashes=hashes.tobytes(),
            params=params,
            stop_ids=tuple(dict.fromkeys(stop_ids)),
            salt=prompt.salt,
            priority=priority,
            tenant=prompt.tenant or "",
            deadline_s=None if prompt.deadline_s == math.inf else prompt.deadline_s,
        )
        generation = Generation(stream, prompt, choices, notify, each_token)
        generation.hashes = request.hashes
        if params.prompt_logprobs is not None:
            generation.prompt_logprobs = PromptTable(prompt, self._tokenizer)
        return generation, request

    def _forget(self, generations: Iterable[Generation]) -> list[int]:
        with self._lock:
            streams = [stream for generation in generations for stream in generation.streams if stream in self._live]
            for stream in streams:
                del self._live[stream]
        return streams

    # ---- the thread ----

    def _pump(self) -> None:
        while (event := self._inbox.get()) is not None:
            try:
                if isinstance(event, str):
                    self._fail(event)
                else:
                    self._apply(event)
            except Exception as error:
                logger.exception("the front end failed")
                self._fail(f"the front end failed: {error}")
        self._fail("the engine was shut down")

    def _apply(self, deltas: Deltas) -> None:
        """Extends every stream that got tokens, ends those that finished, then wakes each caller once."""
        touched: dict[int, Generation] = {}
        entries: dict[int, list[TokenLogprobs]] = {}
        for stream, payload in deltas.logprobs:
            entry = read_payload(payload)
            if isinstance(entry, TokenLogprobs):
                entries.setdefault(stream, []).append(entry)
            elif (generation := self._fill_prompt(stream, entry)) is not None:
                touched[generation.stream] = generation
        streams = np.frombuffer(deltas.streams, dtype="<i8").tolist()
        columns = np.frombuffer(deltas.tokens, dtype="<i4").reshape(-1, len(streams)).T.tolist() if streams else []
        for stream, column in zip(streams, columns, strict=True):
            tokens = [token for token in column if token != NO_TOKEN]
            if tokens and (live := self._live.get(stream)) is not None:
                generation, choice = live
                with generation.lock:
                    keep_tokens = choice.extend(tokens, entries.get(stream, ()))
                if keep_tokens is not None:
                    self.engine.stop(stream, keep_tokens)
                touched[generation.stream] = generation
        for finished in deltas.finished:
            generation_ended = self._end(finished)
            if generation_ended is not None:
                touched[generation_ended.stream] = generation_ended
        self._wake(touched.values())

    def _fill_prompt(self, stream: int, part: PromptLogprobs) -> Generation | None:
        live = self._live.get(stream)
        if live is None or live[0].prompt_logprobs is None:
            return None
        with live[0].lock:
            live[0].prompt_logprobs.fill(part)
        return live[0]

    def _end(self, finished: Finished) -> Generation | None:
        with self._lock:
            live = self._live.pop(finished.stream, None)
        if live is None:
            return None
        generation, choice = live
        with generation.lock:
            choice.end(finished)
        return generation

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._lost = self._lost or reason
            streams = list(self._live)
        ended = (self._end(Finished(stream, FinishReason.FAILED, 0, 0, reason, Failure.UNAVAILABLE)) for stream in streams)
        self._wake({generation.stream: generation for generation in ended if generation is not None}.values())

    def _wake(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            with contextlib.suppress(RuntimeError):  # the caller's event loop is closed: nobody waits
                generation.wake()
