"""What there is to say of a request once it has ended, for metrics, logs and traces; never its content.

Imports the types of a request under way and the doors' errors.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.frontend.errors import RequestError
from deploy.frontend.generation.generation import Generation
from deploy.frontend.outputs import OutputDelta
from deploy.text.prompts import Prompt
from scheduler.protocol.messages import NO_MISSES, Misses


@dataclass(frozen=True, slots=True)
class PromptUse:
    """One prompt of a request, without its content. hashes: of its full blocks, a uint64 buffer, as in `messages.Request`.

    output_tokens: of each choice.
    """

    prompt_tokens: int
    hashes: bytes
    output_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """One request that has ended, for metrics, logs and traces. Seconds by this process's monotonic clock.

    outcome: "stop", "length", "abort", or the name of a `Fault` in lower case. ttft_s: None if no token came.
    queued_s: until its first start, by the scheduler's clock; None if no choice has ended. output_tokens: of all choices.
    misses: of the prompts, what was not cached. block_size: tokens of a hashed block. traceparent: the caller's span, as in
    W3C's trace context.
    """

    request_id: str
    outcome: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    started_unix_s: float
    queued_s: float | None
    ttft_s: float | None
    e2e_s: float
    preemptions: int
    priority: int
    message: str = ""
    prompts: tuple[PromptUse, ...] = ()
    misses: Misses = NO_MISSES
    block_size: int = 0
    traceparent: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first, of the longest choice, since choices grow side by side; None below two tokens."""
        longest = max((tokens for use in self.prompts for tokens in use.output_tokens), default=self.output_tokens)
        if self.ttft_s is None or longest < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (longest - 1)


Observe = Callable[[Observation], None]


class RequestRecord:
    """Gathers the one `Observation` of a request."""

    def __init__(self, request_id: str, traceparent: str | None, prompts: Sequence[Prompt]) -> None:
        self._id = request_id
        self._priority = prompts[0].terms.priority
        self._traceparent = traceparent
        self._prompt_tokens = [len(prompt.token_ids) for prompt in prompts]
        self._output_tokens = [[0] * prompt.params.n for prompt in prompts]
        self._started_unix_s = time.time()
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._cached = self._preemptions = 0
        self._misses = NO_MISSES
        self._queued_s: float | None = None
        self._outcome, self._message = "abort", ""

    def take(self, position: int, delta: OutputDelta) -> None:
        if self._first_s is None and any(choice.token_ids for choice in delta.choices):
            self._first_s = time.monotonic()
        for choice in delta.choices:
            self._output_tokens[position][choice.index] += len(choice.token_ids)
        for finished in delta.ends:
            self._preemptions += finished.preemptions
            self._queued_s = max(self._queued_s or 0.0, finished.queued_s)
        if delta.finished:
            self._cached += delta.cached_tokens or 0
            self._misses = self._misses + delta.misses
            self._outcome = next((c.finish_reason for c in reversed(delta.choices) if c.finish_reason), "stop")

    def fail(self, error: RequestError) -> RequestError:
        self._outcome, self._message = error.fault.name.lower(), error.message
        return error

    def end(self, generations: Sequence[Generation], block_size: int) -> Observation:
        """generations: of all prompts, or none if they could not be submitted."""
        hashes = [generation.hashes for generation in generations] or [b""] * len(self._prompt_tokens)
        outputs = [tuple(tokens) for tokens in self._output_tokens]
        return Observation(
            request_id=self._id,
            outcome=self._outcome,
            prompt_tokens=sum(self._prompt_tokens),
            cached_tokens=self._cached,
            output_tokens=sum(sum(tokens) for tokens in outputs),
            started_unix_s=self._started_unix_s,
            queued_s=self._queued_s,
            ttft_s=None if self._first_s is None else self._first_s - self._started_s,
            e2e_s=time.monotonic() - self._started_s,
            preemptions=self._preemptions,
            priority=self._priority,
            message=self._message,
            prompts=tuple(map(PromptUse, self._prompt_tokens, hashes, outputs)),
            misses=self._misses,
            block_size=block_size,
            traceparent=self._traceparent,
        )
