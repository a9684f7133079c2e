"""One request's own life: what each of its choices has produced so far, and what of it the caller has taken.

Knows no engine and starts no threads: `frontend` brings what comes from the engine, the caller takes, and a generation's lock
is all that is between the two. Imports `choice`, `submission`, the words for outputs and the wire types; never `frontend`, no
torch, no ray.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from deploy.frontend.generation.choice import NOTHING_TOLD, WHOLE_ENDS, GrowingChoice, OutputGap, Told
from deploy.frontend.generation.submission import Submission
from deploy.frontend.outputs import OutputDelta, PromptEntries, RequestOutput, Vector, read_logprobs
from deploy.text.prompts import Prompt
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import NO_MISSES, Finished, Pooled, PromptLogprobs, Request, TokenLogprobs

Notify = Callable[["Generation"], object]


class NotFinite(ArithmeticError):
    """What the model has computed is no number that could be told."""


class PromptTable:
    """Log-probabilities of one prompt, filled as its chunks are computed; chunks may come twice."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer | None) -> None:
        self._entries: PromptEntries = [None] * len(prompt.token_ids)
        self._tokens = prompt.token_ids
        self._tokenizer = tokenizer
        self._begin = tokenizer.first_shown(prompt.token_ids) if tokenizer else None
        self._known = 1  # nothing predicts the first token
        self._taken = False

    def fill(self, part: PromptLogprobs) -> None:
        """Errors: OutputGap."""
        if part.first > self._known:
            raise OutputGap(f"the prompt's log-probabilities {self._known} to {part.first - 1} have not arrived: ask again")
        for position, entry in enumerate(part.tokens, start=part.first):
            begins = position == self._begin
            self._entries[position] = read_logprobs(entry, self._tokens[position], self._tokenizer, begins)
        self._known = max(self._known, part.first + len(part.tokens))

    @property
    def whole(self) -> PromptEntries | None:
        """None until it is complete."""
        return self._entries if self._known == len(self._entries) else None

    def take(self) -> PromptEntries | None:
        """The whole table, once."""
        if self._taken or self.whole is None:
            return None
        self._taken = True
        return self.whole


class Generation:
    """A request under way, as its caller holds it.

    The front end calls `fill_prompt`, `extend`, `end` and `wake`; the caller `take` or `take_delta`, from any thread.
    """

    def __init__(
        self, submission: Submission, prompt: Prompt, tokenizer: Tokenizer | None, notify: Notify, each_token: bool,
        told: Sequence[Told] = (),
    ) -> None:  # fmt: skip
        """submission: the prompt as the engine gets it. notify, each_token, told: as in `FrontEnd.submit`."""
        params, stop_ids = prompt.params, frozenset(submission.request.stop_ids)
        self.prompt = prompt
        self.submission = submission
        self.stream = submission.request.stream
        self.streams = range(self.stream, self.stream + params.n)
        """A number for each choice."""
        self.hashes = submission.request.hashes
        self._lock = threading.Lock()
        self._choices = [
            GrowingChoice(index, prompt, stop_ids, tokenizer, each_token, had)
            for index, had in enumerate(told or [NOTHING_TOLD] * params.n)
        ]
        self._prompt_logprobs = None if params.prompt_logprobs is None else PromptTable(prompt, tokenizer)
        self._pooled: Vector | None = None
        self._notify = notify
        self._each_token = each_token
        self._notified = False  # and not taken since
        self._done = False  # the last output was taken

    @property
    def finished(self) -> bool:
        """Every choice has ended."""
        return all(choice.finished is not None for choice in self._choices)

    # ---- what the front end brings ----

    def fill_prompt(self, part: PromptLogprobs | Pooled) -> None:
        """What was found out of the prompt. Does nothing if that was not asked for. Errors: OutputGap, NotFinite."""
        if isinstance(part, Pooled):
            pooled = np.frombuffer(part.values, np.float32)
            if not np.isfinite(pooled).all():
                raise NotFinite("the model's hidden states were not finite (NaN or infinite)")
            with self._lock:
                self._pooled = pooled
        elif self._prompt_logprobs is not None:
            with self._lock:
                self._prompt_logprobs.fill(part)

    def extend(self, stream: int, position: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> int | None:
        """As `GrowingChoice.extend`, for the choice of this stream."""
        with self._lock:
            return self._choices[stream - self.stream].extend(position, tokens, logprobs)

    def recall(self, stream: int, tokens: Sequence[int]) -> int | None:
        """As `GrowingChoice.recall`, for the choice of this stream."""
        with self._lock:
            return self._choices[stream - self.stream].recall(tokens)

    def unread(self, stream: int) -> int:
        """As `GrowingChoice.unread`, for the choice of this stream."""
        return self._choices[stream - self.stream].unread

    def lose(self, reason: str, now_s: float) -> list[Finished]:
        """The scheduler is lost, for this reason. Returns the ends of those that another one is not asked for: they have their
        stop string, or have lost too many."""
        with self._lock:
            stopped = [c for c in self._choices if c.finished is None and c.stopped]
            ends = [self.submission.stopped(choice.index, len(choice.token_ids)) for choice in stopped]
            return ends + self.submission.lose(self._outputs(), reason, now_s)

    def requests(self, block_size: int, now_s: float) -> list[Request]:
        """What a scheduler that knows nothing of it is to be asked."""
        with self._lock:
            prompt_told = self._prompt_logprobs is None or self._prompt_logprobs.whole is not None
            return self.submission.requests(self._outputs(), prompt_told, block_size, now_s)

    def _outputs(self) -> dict[int, list[int]]:
        """Of the choices that need more."""
        return {c.index: c.token_ids for c in self._choices if c.finished is None and not c.stopped}

    def end(self, finished: Finished) -> None:
        """As `GrowingChoice.end`, for the choice of this stream."""
        with self._lock:
            if finished.reason in WHOLE_ENDS and sum(choice.finished is None for choice in self._choices) == 1:
                self._check_prompt()
            self._choices[finished.stream - self.stream].end(finished)

    def _check_prompt(self) -> None:
        """Before the last choice ends. Errors: OutputGap."""
        if self._prompt_logprobs is not None and self._prompt_logprobs.whole is None:
            raise OutputGap("the prompt's last log-probabilities have not arrived: ask again")
        if self.prompt.pooling is not None and self._pooled is None:
            raise OutputGap("what was made of the prompt has not arrived: ask again")

    def wake(self) -> None:
        """Tells the caller once until it takes: progress if it wants each token, else the end."""
        with self._lock:
            if self._notified or self._done or not (self._each_token or self.finished):
                return
            self._notified = True
        self._notify(self)

    # ---- what the caller takes ----

    def take(self) -> RequestOutput:
        """The request as it stands."""
        with self._lock:
            ends = self._take_ends()
            error = next((error for choice in self._choices if (error := choice.error) is not None), None)
            return RequestOutput(
                request_id=str(self.stream),
                prompt=self.prompt.text,
                prompt_token_ids=self.prompt.token_ids,
                num_cached_tokens=ends[0].cached_tokens if ends else None,
                outputs=[choice.take() for choice in self._choices],
                finished=self._done,
                error=error.message if error else None,
                fault=error.fault if error else None,
                prompt_logprobs=self._prompt_logprobs.whole if self._prompt_logprobs else None,
                pooled=self._pooled,
            )

    def take_delta(self) -> OutputDelta | None:
        """What is new since the previous call; None if nothing is. Costs what is new, not what has come so far."""
        with self._lock:
            ends = self._take_ends()
            choices = [delta for choice in self._choices for delta in choice.take_deltas()]
            prompt = self._prompt_logprobs.take() if self._prompt_logprobs else None
            if not choices and prompt is None:
                return None
            told = {delta.index for delta in choices if delta.finish_reason is not None}
            new_ends = [end for end in ends if end.stream - self.stream in told]
            cached_tokens, misses = (ends[0].cached_tokens, ends[0].misses) if ends else (None, NO_MISSES)
            seed = self.submission.seed
            return OutputDelta(choices, self._done, cached_tokens, prompt, new_ends, seed, misses, self._pooled)

    def _take_ends(self) -> list[Finished]:
        """Of all choices that have ended, in their order. The caller has the request as it stands now."""
        ends = [choice.finished for choice in self._choices if choice.finished is not None]
        self._notified, self._done = False, len(ends) == len(self._choices)
        return ends
