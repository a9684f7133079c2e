"""One choice of a request: its tokens, their text, and stop strings in it.

Imports the words for outputs and text (`outputs`, `errors`, `prompts`, `tokenizer`, `stops`) and the wire types; no threads.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import structs

from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import FINISH_WORDS, ChoiceDelta, CompletionOutput, FinishWord, Logprob, read_logprobs
from deploy.text.prompts import Prompt
from deploy.text.stops import StopStrings
from deploy.text.tokenizer import Detokenizer, Tokenizer
from scheduler.protocol.messages import Finished, FinishReason, TokenLogprobs

Extent = tuple[int, int, bool]
"""How far a choice has come: characters, tokens, whether it has ended."""

WHOLE_ENDS = (FinishReason.STOP, FinishReason.LENGTH)
"""Of an output that has come as far as it should."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a caller has of a choice from an earlier run of the same request: so many tokens, their CRC-32 (as int32), and
    whether they are all."""

    tokens: int = 0
    check: int = 0
    ended: bool = False


NOTHING_TOLD = Told()

UNMEASURED = TokenLogprobs(math.nan, (), ())
"""Of a token that the caller has had before."""


class OutputGap(RuntimeError):
    """Something of an output was committed and has not arrived here: what follows cannot be told."""


class GrowingChoice:
    """One stream: the tokens of one choice and their text so far. Guarded by its generation's lock.

    Its reasons are told with its end: a stop string that was found before is no end yet.
    """

    def __init__(
        self, index: int, prompt: Prompt, stop_ids: frozenset[int], tokenizer: Tokenizer | None, each_token: bool,
        told: Told = NOTHING_TOLD,
    ) -> None:  # fmt: skip
        """each_token: False where only the whole output matters; its text is then decoded once, at the end. told: until the
        output has come so far nothing is new; then that comes first, by itself."""
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
        self._shown: Extent = (0, 0, False)  # when it was last taken
        self._told = told
        self._awaits = told != NOTHING_TOLD
        self._known: Extent | None = None  # what the caller had before, to be taken first

    def extend(self, position: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> int | None:
        """Takes the next tokens, unless a stop string was found or it has ended. position: how many were there before these,
        the prompt's included. logprobs: one for each token, if they were asked for. Returns how many tokens the output keeps
        if a stop string was found just now. Errors: OutputGap."""
        if self.finished is not None or self._stops.found is not None:
            return None
        self._check_gap(position - self._prompt_tokens)
        if self.logprobs is not None and len(logprobs) != len(tokens):
            raise OutputGap(f"{len(logprobs)} log-probabilities came with {len(tokens)} tokens")
        return self._extend(tokens, iter(logprobs))

    def recall(self, tokens: Sequence[int]) -> int | None:
        """Takes the first of its tokens, which its caller has had, as `extend` does. Errors: OutputGap if it has any."""
        self._check_gap(0)
        return self._extend(tokens, itertools.repeat(UNMEASURED))

    def _extend(self, tokens: Sequence[int], entries: Iterator[TokenLogprobs]) -> int | None:
        for token in tokens:
            self.token_ids.append(token)
            if self.logprobs is not None:
                self.logprobs.append(read_logprobs(next(entries), token, self._tokenizer, self._begins))
            if self._begins and self._tokenizer is not None and token not in self._tokenizer.special:
                self._begins = False
            if self._detokenizer is not None and not self._at_once:
                fresh = self._detokenizer.push((token,)) if token not in self._stop_ids else ""
                self._show(fresh + self._stops.sign(token))
            if self._awaits and len(self.token_ids) == self._told.tokens and not self._told.ended:
                self._awaits, self._known = False, self._extent
            if self._stops.found is not None:
                return len(self.token_ids)
        return None

    def end(self, finished: Finished) -> None:
        """The stream's one end. A stop string that was found here counts, even if another end was committed first.
        Errors: OutputGap, or whatever the tokenizer raises over the last of the text, unless the stream has failed anyway; it
        has not ended then."""
        self._end(finished)
        if self._awaits:  # its last was told, or it has ended where it had not before
            self._awaits, self._known = False, self._extent

    def _end(self, finished: Finished) -> None:
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
    def stopped(self) -> bool:
        """A stop string was found: its output is whole, whether or not its end has come."""
        return self._stops.found is not None

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

    def take_deltas(self) -> Iterator[ChoiceDelta]:
        """What is new since the previous call, if anything is; before it what the caller had from an earlier run."""
        if self._known is not None:
            known, self._known = self._known, None
            yield self._delta(known, known=True)
        if not self._awaits and self._shown != self._extent:
            yield self._delta(self._extent)

    def _delta(self, after: Extent, known: bool = False) -> ChoiceDelta:
        """From what was shown up to there."""
        (text_at, tokens_at, _), self._shown = self._shown, after
        text_end, tokens_end, ended = after
        return ChoiceDelta(
            self.index, self.text[text_at:text_end], self.token_ids[tokens_at:tokens_end],
            None if self.logprobs is None else self.logprobs[tokens_at:tokens_end],
            self.finish_reason if ended else None, self.stop_reason if ended else None, known,
        )  # fmt: skip

    @property
    def unread(self) -> int:
        """Tokens that have come since it was last taken; none while the caller had them before."""
        return 0 if self._awaits else len(self.token_ids) - (self._known or self._shown)[1]

    @property
    def _extent(self) -> Extent:
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
