"""Log-probabilities in OpenAI's two shapes and vLLM's. Imports the outputs and the tokenizer; no HTTP."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from deploy.doors.openai.answers.records import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from deploy.frontend.outputs import Logprob
from deploy.text.tokenizer import REPLACEMENT, Tokenizer

Entry = dict[int, Logprob]
"""One token's: the sampled one first, then the likeliest."""

LOWEST = -9999.0
"""What an impossible token has instead of minus infinity, which JSON does not know; as OpenAI."""


class TokenNames:
    """What a token is called. One that is part of a character is called by its bytes, as OpenAI does: `bytes:\\xe4\\xbd`."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def content(self, token: int, text: str | None) -> bytes:
        """UTF-8 of what the token adds to the text, or its share of it; a special token adds nothing. text: the token's, where
        it stands."""
        if self._tokenizer is None or token in self._tokenizer.special:
            return b""
        return text.encode() if text is not None and REPLACEMENT not in text else self._tokenizer.token_bytes(token)

    def name(self, token: int, text: str | None) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        if token in self._tokenizer.special:
            return self._tokenizer.special[token]
        content = self.content(token, text)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionTable:
    """The table of one choice of a completion, a part at a time: it knows how far into the text it is."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def part(self, entries: Iterable[tuple[int, str | None, Entry | None]]) -> CompletionLogprobs:
        """entries: (token, its text, its entry; None where nothing predicts the token)."""
        table = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, text, entry in entries:
            table.tokens.append(self._names.name(token, text))
            table.token_logprobs.append(None if entry is None else finite(entry[token]))
            table.top_logprobs.append(
                None if entry is None else {self._names.name(t, e.decoded_token): finite(e) for t, e in entry.items()}
            )
            table.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(self._names.content(token, text)))
        return table


def finite(entry: Logprob) -> float:
    """The log-probability, as JSON can say it."""
    return max(entry.logprob, LOWEST)


def sampled(entries: Iterable[Entry]) -> Iterable[tuple[int, str | None, Entry | None]]:
    """Entries of output tokens as `CompletionTable.part` takes them."""
    for entry in entries:
        token = next(iter(entry))
        yield token, entry[token].decoded_token, entry


def of_prompt(
    tokens: Sequence[int], entries: Sequence[Entry | None], tokenizer: Tokenizer | None
) -> Iterable[tuple[int, str | None, Entry | None]]:
    """Entries of a prompt as `CompletionTable.part` takes them."""
    begin = tokenizer.first_shown(tokens) if tokenizer is not None else None
    for at, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        text = tokenizer.token_text(token, at == begin) if entry is None and tokenizer is not None else None
        yield token, text if entry is None else entry[token].decoded_token, entry


def chat_logprobs(entries: Iterable[Entry], names: TokenNames) -> ChatLogprobs:
    """The likeliest tokens in order; as many as were asked for."""

    def shown(token: int, entry: Logprob) -> dict[str, Any]:
        content = names.content(token, entry.decoded_token)
        return {"token": names.name(token, entry.decoded_token), "logprob": finite(entry), "bytes": list(content)}

    content = []
    for entry in entries:
        token = next(iter(entry))
        ranked = sorted((e.rank, t) for t, e in entry.items() if e.rank is not None)
        likeliest = [TopLogprob(**shown(t, entry[t])) for _, t in ranked]
        content.append(TokenLogprob(**shown(token, entry[token]), top_logprobs=likeliest))
    return ChatLogprobs(content=content)


def vllm_prompt_logprobs(entries: Sequence[Entry | None]) -> PromptLogprobs:
    """As vLLM's `prompt_logprobs` has them, by token id."""
    return [
        None
        if entry is None
        else {t: PromptLogprob(logprob=finite(e), rank=e.rank, decoded_token=e.decoded_token) for t, e in entry.items()}
        for entry in entries
    ]
