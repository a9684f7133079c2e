"""One request's own life: what each of its choices has produced so far, and what of it the caller has taken.

Tokens become text here, and stop strings are found. Knows no engine and starts no threads: `frontend` brings what comes from
the engine, the caller takes, and a generation's lock is all that is between the two. Imports the words for outputs and text
(`outputs`, `errors`, `prompts`, `text`, `stops`) and the wire types; never `frontend`, no torch, no ray.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence

from msgspec import structs

from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import (
    FINISH_WORDS,
    ChoiceDelta,
    CompletionOutput,
    FinishWord,
    Logprob,
    OutputDelta,
    PromptEntries,
    RequestOutput,
    read_logprobs,
)
from deploy.text.prompts import Prompt
from deploy.text.stops import StopStrings
from deploy.text.tokenizer import Detokenizer, Tokenizer
from scheduler.protocol.messages import Finished, FinishReason, PromptLogprobs, Request, TokenLogprobs

Notify = Callable[["Generation"], object]

WHOLE_ENDS = (FinishReason.STOP, FinishReason.LENGTH)
"""Of an output that has come as far as it should."""


class OutputGap(RuntimeError):
    """Something of an output was committed and has not arrived here: what follows cannot be told."""


class Choice:
    """One stream: the tokens of one choice and their text so far. Guarded by its generation's lock.

    Its reasons are told with its end: a stop string that was found before is no end yet.
    """

    def __init__(
        self, index: int, prompt: Prompt, stop_ids: frozenset[int], tokenizer: Tokenizer | None, each_token: bool
    ) -> None:
        """each_token: False where only the whole output matters; its text is then decoded once, at the end."""
        self.index = index
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[dict[int, Logprob]] | None = None if prompt.params.logprobs is None else []
        self.finish_reason: FinishWord | None = None
        self.stop_reason: int | str | None = None
        self.finished: Finished | None = None
        self._prompt_tokens = len(prompt.token_ids)
        self._params = prompt.params
        self._stop_ids = stop_ids
        self._tokenizer = tokenizer
        before = [] if prompt.answered else prompt.token_ids
        self._detokenizer = Detokenizer(tokenizer.decode, before, tokenizer.special) if tokenizer else None
        self._begins = tokenizer is not None and tokenizer.first_shown(before) is None  # its text has not begun
        self._stops = StopStrings(prompt.params.stop, tokenizer.special if tokenizer else None)
        self._at_once = not each_token and not prompt.params.stop
        self._shown = (0, 0, False)  # its extent when it was last taken

    def extend(self, position: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> int | None:
        """Takes the next tokens, unless a stop string was found or it has ended. position: how many were there before these,
        the prompt's included. logprobs: one for each token, if they were asked for. Returns how many tokens the output keeps
        if a stop string was found just now. Errors: OutputGap."""
        if self.finished is not None or self._stops.found is not None:
            return None
        self._check_gap(position - self._prompt_tokens)
        if self.logprobs is not None and len(logprobs) != len(tokens):
            raise OutputGap(f"{len(logprobs)} log-probabilities came with {len(tokens)} tokens")
        entries = iter(logprobs)
        for token in tokens:
            self.token_ids.append(token)
            if self.logprobs is not None:
                self.logprobs.append(read_logprobs(next(entries), token, self._tokenizer, self._begins))
            if self._begins and self._tokenizer is not None and token not in self._tokenizer.special:
                self._begins = False
            if self._detokenizer is not None and not self._at_once:
                fresh = self._detokenizer.push((token,)) if token not in self._stop_ids else ""
                self._show(fresh + self._stops.sign(token))
                if self._stops.found is not None:
                    return len(self.token_ids)
        return None

    def end(self, finished: Finished) -> None:
        """The stream's one end. A stop string that was found here counts, even if another end was committed first.
        Errors: OutputGap, or whatever the tokenizer raises over the last of the text, unless the stream has failed anyway; it
        has not ended then."""
        if self._stops.found is None:
            if finished.reason in WHOLE_ENDS:
                self._check_gap(finished.tokens)
            with contextlib.suppress(*(Exception,) if finished.reason is FinishReason.FAILED else ()):
                self._show_rest()
        if self._stops.found is not None:
            self.finished = structs.replace(finished, reason=FinishReason.STOP, message="")
            self.finish_reason, self.stop_reason = "stop", self._stops.found
            return
        self.finished = finished
        self.finish_reason = FINISH_WORDS[finished.reason]
        if finished.reason is FinishReason.STOP and self.token_ids and self.token_ids[-1] in self._params.stop_token_ids:
            self.stop_reason = self.token_ids[-1]

    @property
    def error(self) -> RequestError | None:
        """Why the choice failed, if it did."""
        if self.finished is None or self.finished.reason is not FinishReason.FAILED:
            return None
        return RequestError.of_end(self.finished)

    def take(self) -> CompletionOutput:
        """This choice as it stands; what is new counts from the previous call."""
        (text_at, tokens_at, _), self._shown = self._shown, self._extent
        return CompletionOutput(
            self.index, self.text, self.token_ids.copy(), None if self.logprobs is None else self.logprobs.copy(),
            self.finish_reason, self.stop_reason, self.text[text_at:], len(self.token_ids) - tokens_at,
        )  # fmt: skip

    def take_delta(self) -> ChoiceDelta | None:
        """What is new since the previous call; None if nothing is."""
        before, self._shown = self._shown, self._extent
        if before == self._shown:
            return None
        text_at, tokens_at, _ = before
        return ChoiceDelta(
            self.index, self.text[text_at:], self.token_ids[tokens_at:],
            None if self.logprobs is None else self.logprobs[tokens_at:], self.finish_reason, self.stop_reason,
        )  # fmt: skip

    @property
    def unread(self) -> int:
        """Tokens that have come since it was last taken."""
        return len(self.token_ids) - self._shown[1]

    @property
    def _extent(self) -> tuple[int, int, bool]:
        """How far it has come: characters, tokens, whether it has ended."""
        return len(self.text), len(self.token_ids), self.finished is not None

    def _check_gap(self, committed: int) -> None:
        """committed: tokens of output that the scheduler has told so far."""
        if committed != len(self.token_ids):
            raise OutputGap(
                f"{committed} tokens of it were committed and {len(self.token_ids)} have arrived: ask again, and report it "
                "as a fault of the server's"
            )

    def _show_rest(self) -> None:
        """What is held back until the end. A stop string may be in it."""
        if self._detokenizer is not None:
            if self._at_once:
                self._show(self._detokenizer.push([token for token in self.token_ids if token not in self._stop_ids]))
            self._show(self._detokenizer.flush())
            self.text += self._stops.flush()

    def _show(self, text: str) -> None:
        self.text += self._stops.push(text, armed=len(self.token_ids) > self._params.min_tokens)


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
        self, request: Request, prompt: Prompt, tokenizer: Tokenizer | None, notify: Notify, each_token: bool
    ) -> None:
        """request: the prompt as the engine gets it. notify, each_token: as in `FrontEnd.submit`."""
        params, stop_ids = prompt.params, frozenset(request.stop_ids)
        self.prompt = prompt
        self.stream = request.stream
        self.hashes = request.hashes
        self._lock = threading.Lock()
        self._choices = [Choice(index, prompt, stop_ids, tokenizer, each_token) for index in range(params.n)]
        self._prompt_logprobs = None if params.prompt_logprobs is None else PromptTable(prompt, tokenizer)
        self._notify = notify
        self._each_token = each_token
        self._notified = False  # and not taken since
        self._done = False  # the last output was taken

    @property
    def streams(self) -> range:
        """One stream number for each choice."""
        return range(self.stream, self.stream + len(self._choices))

    @property
    def finished(self) -> bool:
        """Every choice has ended."""
        return all(choice.finished is not None for choice in self._choices)

    # ---- what the front end brings ----

    def fill_prompt(self, part: PromptLogprobs) -> None:
        """Does nothing if they were not asked for."""
        if self._prompt_logprobs is not None:
            with self._lock:
                self._prompt_logprobs.fill(part)

    def extend(self, stream: int, position: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> int | None:
        """As `Choice.extend`, for the choice of this stream."""
        with self._lock:
            return self._choices[stream - self.stream].extend(position, tokens, logprobs)

    def unread(self, stream: int) -> int:
        """As `Choice.unread`, for the choice of this stream."""
        return self._choices[stream - self.stream].unread

    def end(self, finished: Finished) -> None:
        """As `Choice.end`, for the choice of this stream."""
        with self._lock:
            if finished.reason in WHOLE_ENDS and sum(choice.finished is None for choice in self._choices) == 1:
                self._check_prompt()
            self._choices[finished.stream - self.stream].end(finished)

    def _check_prompt(self) -> None:
        """Before the last choice ends. Errors: OutputGap."""
        if self._prompt_logprobs is not None and self._prompt_logprobs.whole is None:
            raise OutputGap("the prompt's last log-probabilities have not arrived: ask again")

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
            )

    def take_delta(self) -> OutputDelta | None:
        """What is new since the previous call; None if nothing is. Costs what is new, not what has come so far."""
        with self._lock:
            ends = self._take_ends()
            choices = [delta for choice in self._choices if (delta := choice.take_delta()) is not None]
            prompt = self._prompt_logprobs.take() if self._prompt_logprobs else None
            if not choices and prompt is None:
                return None
            told = {delta.index for delta in choices if delta.finish_reason is not None}
            new_ends = [end for end in ends if end.stream - self.stream in told]
            return OutputDelta(choices, self._done, ends[0].cached_tokens if ends else None, prompt, new_ends)

    def _take_ends(self) -> list[Finished]:
        """Of all choices that have ended, in their order. The caller has the request as it stands now."""
        ends = [choice.finished for choice in self._choices if choice.finished is not None]
        self._notified, self._done = False, len(ends) == len(self._choices)
        return ends
