"""Prompts that can only be valid: token ids within the vocabulary and the model's length, what to sample, and on which terms.

    content, params, terms ──PromptParser──▶ Prompt

Made once, here, for every door; nothing behind checks or changes them again. What users hand over in Python and in files is
read by `sources`. torch comes in only to read a checkpoint's settings.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.text.content import Content, Conversation, PromptError, PromptTooLong, TextPair
from deploy.text.files import surrogate
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import Adapter, Pooling, context_length
from scheduler.protocol.sampling import SamplingParams
from workers.config import USUAL, ReadingConfig

if TYPE_CHECKING:
    from workers.model.pooling import Uses

MOST_STOP_CHARACTERS, MOST_SALT_CHARACTERS = 16384, 1024
"""A salt with its account in front."""

USUAL_CHARACTERS = 8
"""Of a token, at most, in texts that people write: so much of a text is tokenised at first for each token that may be."""

SPARE_SHARE, SPARE_TOKENS = 8, 64
"""A beginning may have this part, and these, of the allowed tokens more than the same characters have within the whole text:
how a text is cut into tokens depends a little on what follows."""

MOST_URGENT, LEAST_URGENT = -(1 << 31), (1 << 31) - 1


class TextTooLong(ValueError):
    """More than the allowed tokens; the message says what was seen of it."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model sets for a request. eos_ids end an output unless ignore_eos. max_tokens: prompt and output
    together."""

    vocab_size: int
    max_tokens: int
    eos_ids: tuple[int, ...]

    def ending_as(self, tokenizer: Tokenizer | None) -> "ModelLimits":
        """With the ends that the tokenizer and its chat template have, which the checkpoint's settings need not name."""
        ends = {end for end in tokenizer.end_ids if end < self.vocab_size} if tokenizer is not None else set()
        return replace(self, eos_ids=tuple(sorted(ends.union(self.eos_ids))))


@dataclass(frozen=True, slots=True)
class Terms:
    """For whom a prompt is served, as in `messages.Request`. deadline_s: `math.inf` for none."""

    salt: str = ""
    tenant: str = ""
    priority: int = 0
    deadline_s: float = math.inf


USUAL_PARAMS, USUAL_TERMS = SamplingParams(max_tokens=None), Terms()
"""Where nobody says anything else."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """All that is asked of the engine: at least one id, each within the vocabulary, with room for at least one token of output;
    parameters that fit the model.

    text: as it was given. answered: the output is an answer, a text of its own, and does not continue the prompt's. pooling: no
    output is wanted, but this of the prompt; it needs no room then, and parameters say nothing. adapter: with whose weights
    beside the model's. packed: the ids as they are hashed and sent, int32.
    """

    token_ids: list[int]
    params: SamplingParams = USUAL_PARAMS
    terms: Terms = USUAL_TERMS
    text: str | None = None
    answered: bool = False
    pooling: Pooling | None = None
    adapter: Adapter | None = None
    packed: bytes = field(default=b"", repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.packed:
            object.__setattr__(self, "packed", pack(self.token_ids))


@dataclass(frozen=True, slots=True)
class PromptParser:
    """Makes prompts for one model. tokenizer: None where the checkpoint has none; then only ids will do. adapter: the model is
    a LoRA adapter beside the checkpoint."""

    limits: ModelLimits
    tokenizer: Tokenizer | None
    adapter: Adapter | None = None

    def prompt(self, content: Content, params: SamplingParams = USUAL_PARAMS, terms: Terms = USUAL_TERMS) -> Prompt:
        """Errors: PromptError."""
        self._check(params)
        _check_size("stop", params.stop, MOST_STOP_CHARACTERS)
        _check_size("cache_salt", (terms.salt,), MOST_SALT_CHARACTERS)
        ids = self._ids(content)
        packed = self._packed(ids)
        self._check_room(ids, params)
        text, answered = content if isinstance(content, str) else None, isinstance(content, Conversation)
        return Prompt(ids, params, terms, text, answered, adapter=self.adapter, packed=packed)

    def pooled(self, content: Content, pooling: Pooling, terms: Terms = USUAL_TERMS) -> Prompt:
        """One without output. Errors: PromptError."""
        _check_size("cache_salt", (terms.salt,), MOST_SALT_CHARACTERS)
        ids = self._ids(content)
        packed = self._packed(ids, output=False)
        return Prompt(ids, terms=terms, answered=True, pooling=pooling, adapter=self.adapter, packed=packed)

    def _ids(self, content: Content) -> list[int]:
        """Errors: PromptError."""
        if isinstance(content, Conversation):
            return self._chat(content)
        if isinstance(content, TextPair):
            return self._encode_pair(content)
        return self._encode(content) if isinstance(content, str) else content

    def _check(self, params: SamplingParams) -> None:
        """Holds them against the model. Errors: PromptError with the field's name."""
        if params.stop and self.tokenizer is None:
            raise PromptError("stop strings need text, and this checkpoint has no tokenizer: use stop_token_ids", "stop")
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in ids:
                if not 0 <= token < self.limits.vocab_size:
                    raise PromptError(f"{name}: {self._outside(token)}", name)

    def _chat(self, conversation: Conversation) -> list[int]:
        """Its text has its own special tokens. Errors: PromptError."""
        tokenizer = self._need_tokenizer()
        try:
            text = tokenizer.template.rendered(conversation.messages, conversation.tools, conversation.template_kwargs)
        except ValueError as error:
            raise PromptError(str(error)) from error
        return self._encode(text, around=False)

    def _encode(self, text: str, *, around: bool = True) -> list[int]:
        """Errors: PromptError, for a text that is far too long before all of it is tokenised, or that UTF-8 cannot hold."""
        tokenizer = self._need_tokenizer()
        return self._within(text, partial(tokenizer.encode, around=around))

    def _encode_pair(self, pair: TextPair) -> list[int]:
        """Errors: as `_encode`."""
        tokenizer = self._need_tokenizer()
        if len(pair.first) > self.limits.max_tokens:
            self._encode(pair.first)
        return self._within(pair.second, partial(tokenizer.encode_pair, pair.first))

    def _within(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Errors: PromptError."""
        tokenizer, most = self._need_tokenizer(), self.limits.max_tokens
        try:
            return encode_within(text, most, encode, lambda: tokenizer.longest_token_bytes)
        except TextTooLong as error:
            raise PromptTooLong(f"{context_length(most)}, and the prompt {error}: shorten it to {most - 1} tokens") from None
        except UnicodeEncodeError as error:
            raise PromptError(surrogate(error)) from None
        except ValueError as error:
            raise PromptError(str(error)) from error

    def _packed(self, ids: list[int], *, output: bool = True) -> bytes:
        """Looks at how many there are before it looks at each. output: one is to follow. Errors: PromptError."""
        if not ids:
            raise PromptError("the prompt is empty: give at least one token")
        most = self.limits.max_tokens
        if len(ids) > most - output:
            raise PromptTooLong(
                f"{context_length(most, output=output)}, and the prompt has {len(ids)}: shorten it to {most - output} or fewer"
            )
        try:
            packed = pack(ids)
        except struct.error as error:
            wrong = next((token for token in ids if not -(1 << 31) <= token < 1 << 31), None)
            raise PromptError(f"token ids: {error}" if wrong is None else self._outside(wrong)) from None
        numbers = np.frombuffer(packed, "<i4")
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= self.limits.vocab_size:
            raise PromptError(self._outside(low if low < 0 else high))
        return packed

    def _check_room(self, ids: list[int], params: SamplingParams) -> None:
        """Errors: PromptTooLong."""
        most, asked = self.limits.max_tokens, params.max_tokens or 0
        if len(ids) + asked > most:
            raise PromptTooLong(
                f"{context_length(most)}, and max_tokens={asked} with the {len(ids)} tokens of the prompt are above it: lower "
                f"max_tokens to {most - len(ids)} or less, or shorten the prompt",
                "max_tokens",
            )

    def _outside(self, token: int) -> str:
        size = self.limits.vocab_size
        return f"token id {token} is outside the vocabulary of {size} entries: use ids from 0 to {size - 1}"

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError("this checkpoint has no tokenizer: give prompt_token_ids instead of text or messages")
        return self.tokenizer


def pack(ids: Sequence[int]) -> bytes:
    """As int32. Errors: struct.error. (`np.array` takes twice as long.)"""
    return struct.pack(f"<{len(ids)}i", *ids)


def encode_within(
    text: str, limit: int, encode: Callable[[str], list[int]], longest_token_bytes: Callable[[], int]
) -> list[int]:
    """Token ids of a text. limit: of tokens. longest_token_bytes: of UTF-8 that one token can stand for.

    A text of more bytes than `limit` of the longest tokens have is refused unread. Of any other its beginning is tokenised,
    twice as much each time, until all of it is, or until the beginning alone has clearly too many tokens. So the time and the
    memory go with the limit, not with the text. A text that has only a few tokens too many is returned.
    Errors: TextTooLong.
    """
    if len(text) > limit:
        size, most = len(text.encode("utf-8", "surrogatepass")), limit * longest_token_bytes()
        if size > most:
            raise TextTooLong(f"has {size} bytes, and {limit} tokens hold {most} at most")
    part = limit * USUAL_CHARACTERS
    while part < len(text):
        tokens = len(encode(text[:part]))
        if tokens > limit + limit // SPARE_SHARE + SPARE_TOKENS:
            raise TextTooLong(f"has more than {limit} tokens in the first {part} of its {len(text)} characters")
        part *= 2
    return encode(text)


def _check_size(field: str, texts: Sequence[str], most: int) -> None:
    """Of what the scheduler and every rank are told beside the prompt. Errors: PromptError."""
    size = sum(map(len, texts))
    if size > most:
        raise PromptError(f"{field}: {size} characters are above the {most} that may be: shorten it", field)


def read_model_uses(
    checkpoint: Path, pooling: str, score_tokens: str | None, how: ReadingConfig = USUAL
) -> "Uses":
    """pooling, score_tokens: as the settings of those names. Errors: ValueError."""
    from workers.model.pooling import read_uses
    from workers.model.reading import read_model

    return read_uses(checkpoint, read_model(checkpoint, how), pooling, score_tokens)


def read_model_limits(
    checkpoint: Path, max_model_len: int | None, tensor_parallel_size: int = 1, how: ReadingConfig = USUAL
) -> ModelLimits:
    """Reads the checkpoint's settings, and refuses what could not run before anything starts. Errors: ValueError."""
    from cluster.resolve import model_length  # brings torch
    from workers.model.reading import read_model

    model = read_model(checkpoint, how)
    model.require(tensor_parallel_size)
    return ModelLimits(model.vocab_size, model_length(model, max_model_len), model.eos_ids)
