"""What a caller gets back. Field names and meanings are vLLM's, so that code written for it reads these.

Imports wire types, and the words that every door has for failures.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from deploy.frontend.errors import Fault
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import NO_MISSES, Finished, FinishReason, Misses, Payload, TokenLogprobs

FinishWord = Literal["stop", "length", "abort", "error"]

FINISH_WORDS: dict[FinishReason, FinishWord] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
    FinishReason.FAILED: "error",
}


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability. rank: 1 is the most likely; None where it is below the ranks that were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptEntries = list[dict[int, Logprob] | None]

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice, whole from its beginning in every output of a stream.

    text: without the stop string, special tokens and any part of a character still under way. token_ids: all sampled
    tokens up to and including the one that ended the output. logprobs: one mapping a token, the chosen token first;
    None if not asked for.
    finish_reason: None while under way. stop_reason: the stop string, or the id out of stop_token_ids, that ended it.
    delta: the text that is new since the previous output of the same stream. new_tokens: so many of the last token_ids
    (and logprobs) are new.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishWord | None = None
    stop_reason: int | str | None = None
    delta: str = ""
    new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new of one choice since the last delta. Fields as in `CompletionOutput`; text and token ids may be empty.

    Text may lag behind its tokens: characters under way and beginnings of stop strings are held back. known: the caller has it
    from an earlier run of the same request; what is new comes after it.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishWord | None
    stop_reason: int | str | None
    known: bool = False


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What is new of one prompt. choices: those that have grown or ended, each once; what is `known` of one comes before.

    finished: every choice has ended. cached_tokens: prompt tokens found in the cache; None until a choice has ended. misses:
    those that were not found, then. prompt_logprobs: complete, once, with or before the first token; an entry for each prompt
    token, None for the first.
    ends: the ends of the choices that ended with this delta. failed: the first of them that failed. seed: of all choices; None
    until one has started. pooled: what was made of a prompt that has no output; with the end.
    """

    choices: list[ChoiceDelta]
    finished: bool
    cached_tokens: int | None
    prompt_logprobs: PromptEntries | None
    ends: list[Finished]
    seed: int | None = None
    misses: Misses = NO_MISSES
    pooled: Vector | None = None

    @property
    def logprobs(self) -> int:
        """How many log-probabilities are new with the choices."""
        return sum(len(entry) for choice in self.choices for entry in choice.logprobs or ())

    @property
    def failed(self) -> Finished | None:
        return next((end for end in self.ends if end.reason is FinishReason.FAILED), None)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its `n` choices. num_cached_tokens: prompt tokens found in the cache; None until a choice has
    ended.

    finished: every choice has ended. error: why, where a choice ended with finish_reason "error"; fault: what went wrong, for
    programs, such as `Fault.TIMED_OUT` where its deadline has passed.
    prompt_logprobs: an entry for each prompt token, None for the first; None if not asked for or not there yet. pooled: what
    was made of a prompt that has no output; with the end.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    num_cached_tokens: int | None
    outputs: list[CompletionOutput]
    finished: bool
    error: str | None = None
    prompt_logprobs: PromptEntries | None = None
    fault: Fault | None = None
    pooled: Vector | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One prompt's embedding."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """One prompt and its embedding. num_cached_tokens: prompt tokens found in the cache."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """One pair's score."""

    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """One pair of texts and its score. prompt_token_ids: of both. num_cached_tokens: of these, those found in the cache."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


class GenerationError(RuntimeError):
    """Requests that could not be completed. outputs: every output of the call, what the failed ones had produced
    included."""

    def __init__(self, message: str, outputs: Iterable[RequestOutput] = ()) -> None:
        super().__init__(message)
        self.outputs = list(outputs)

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> "GenerationError":
        """Names how many failed, and each different reason once."""
        every = list(outputs)
        failed = [output for output in every if output.error]
        reasons = "; ".join(dict.fromkeys(output.error or "" for output in failed))
        count = f"{len(failed)} of {len(every)} requests failed: " if len(every) > 1 else ""
        return cls(f"{count}{reasons}", every)


def read_payload(payload: bytes) -> Payload:
    """What a worker sent along with its tokens."""
    return _decoder.decode(payload)


def read_logprobs(
    entry: TokenLogprobs, chosen: int, tokenizer: Tokenizer | None, begins: bool = False
) -> dict[int, Logprob]:
    """One token's entry: the chosen token first, then the most likely ones in order. begins: its text begins with it."""
    ranks = {token: rank for rank, token in enumerate(entry.top_ids, start=1)}
    values = {chosen: entry.logprob} | dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
    return {
        token: Logprob(value, ranks.get(token), tokenizer.token_text(token, begins) if tokenizer else None)
        for token, value in values.items()
    }


_decoder: "msgspec.msgpack.Decoder[Payload]" = msgspec.msgpack.Decoder(Payload)
