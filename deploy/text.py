"""Between text and token ids: the checkpoint's tokenizer, text that grows with its tokens, stop strings.

Imports transformers only when a checkpoint is opened; nothing of the engine.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
PROMPT_TAIL_TOKENS = 4
"""Tokens of the prompt that the detokenizer sees, so that the first word of the output keeps its leading space."""

WINDOW_TOKENS = 16
"""Tokens decoded again at each step at most; bounds the cost per token."""

CHARACTER_TOKENS = 4
"""A character is at most four bytes, hence at most four tokens; what stays broken for longer is not UTF-8."""

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte that is no token."""

BLANK = re.compile("[\u2581\u0120]")
"""How SentencePiece and byte-level BPE write a blank."""

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_CHARACTERS = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
"""The characters with which byte-level BPE, since GPT-2, writes bytes."""

TOOL_MARKS = ("<tool_call>", "</tool_call>")
"""Tokens that belong to the text also where a checkpoint calls them special: calls are told by them."""

Message = Mapping[str, Any]
"""A chat message: {"role": "user", "content": "..."} and whatever else the checkpoint's template reads."""

Decode = Callable[[Sequence[int]], str]


class Tokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(self, implementation: Any) -> None:
        """implementation: a transformers tokenizer."""
        self._implementation = implementation
        backend = getattr(implementation, "backend_tokenizer", None)
        self._backend = None if backend is None else _showing_tool_marks(backend)

    @classmethod
    def load(cls, checkpoint: Path) -> "Tokenizer | None":
        """Opens the tokenizer in the checkpoint's folder, without network; None where there is none.

        Errors: ValueError if it is there and cannot be read.
        """
        if not any((checkpoint / name).exists() for name in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True))
        except Exception as error:  # the library raises whatever its parsers raise
            raise ValueError(f"cannot read the tokenizer in {checkpoint}: {error}") from error

    def encode(self, text: str, *, around: bool = True) -> list[int]:
        """Token ids. around: with the special tokens that the checkpoint puts around a prompt."""
        return list(self._implementation.encode(text, add_special_tokens=around, verbose=False))

    @property
    def chat_template(self) -> str:
        """The template of conversations with tools, as it is written; empty if there is none."""
        try:
            return str(self._implementation.get_chat_template(tools=[]))
        except ValueError:
            return ""

    def has_token(self, text: str) -> bool:
        """The text is one token of the vocabulary, by itself."""
        return text in self._implementation.get_added_vocab()

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation: of its `chat_text`, which has its own special tokens. Errors: as there."""
        return self.encode(self.chat_text(messages, tools, template_kwargs), around=False)

    def chat_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation through the checkpoint's template, up to where the assistant's answer begins.

        tools: in OpenAI's form, for the template to show. template_kwargs: what else this template can be told.
        Errors: ValueError, also where the template does not show the tools.
        """
        if not getattr(self._implementation, "chat_template", None):
            raise ValueError("this checkpoint has no chat template: give the prompt as text or as token ids")
        taken = inspect.signature(self._implementation.apply_chat_template).parameters.keys() & (template_kwargs or {}).keys()
        if taken:
            raise ValueError(f"chat_template_kwargs: {min(taken)} is no variable of a template: leave it out")
        text = self._render(messages, tools, template_kwargs or {})
        if tools and text == self._render(messages, None, template_kwargs or {}):
            raise ValueError("the checkpoint's chat template does not show tools to the model: leave tools out")
        return text

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, template_kwargs: Mapping[str, Any]
    ) -> str:
        try:
            return str(
                self._implementation.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=True,
                    **template_kwargs,
                )
            )
        except Exception as error:  # templates raise what they please, jinja's errors among it
            raise ValueError(f"the checkpoint's chat template refuses these messages: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out. Bytes that are not UTF-8 become U+FFFD."""
        if self._backend is not None:
            return str(self._backend.decode(list(tokens), skip_special_tokens=True))
        text = self._implementation.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def token_text(self, token: int) -> str:
        """One token by itself, special tokens included, as log-probabilities show it."""
        return str(self._implementation.decode([token]))

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """Of UTF-8 that one token of a text can stand for, special ones that are written out included: at least as much as any
        does, at most twice (byte-level BPE writes some bytes as two). Takes some 0.1 s the first time."""
        pieces = self._implementation.get_vocab()
        return max((len(BLANK.sub(" ", piece).encode()) for piece in pieces), default=1)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for: less than a character where `token_text` shows U+FFFD."""
        piece = str(self._implementation.convert_ids_to_tokens(token))
        if (byte := BYTE_TOKEN.fullmatch(piece)) is not None:
            return bytes((int(byte[1], 16),))
        if all(character in BYTE_CHARACTERS for character in piece):
            return bytes(BYTE_CHARACTERS[character] for character in piece)
        return self.token_text(token).encode()


class Detokenizer:
    """Text of a sequence as its tokens arrive, never ending inside a character.

    It decodes a window of the last tokens and returns what was not there before, O(1) per token. A window begins where
    a character begins, with at least one token whose text is known already, since some tokenizers drop a leading space.
    While the window's text ends in U+FFFD the character may still be under way, so nothing is returned until it is
    whole or until more tokens came than a character has. (The idea of a read offset and a prefix offset is that of
    text-generation-inference.)

    Invariant: what `push` and `flush` returned is, put together, the decoded tokens less the decoded prompt, wherever
    the tokens are valid UTF-8.
    """

    __slots__ = ("_boundary", "_decode", "_pending", "_shown", "_window")

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = _tail(decode, prompt)
        self._shown = len(decode(self._window))  # characters of the window's text that are out already
        self._boundary = 0  # tokens of the window before the last character border but one
        self._pending = 0  # tokens since the last character border

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is certain now."""
        self._window.extend(tokens)
        self._pending += len(tokens)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            self._pending = 0
            return self._advance(text, len(text), self._boundary)
        if self._pending <= CHARACTER_TOKENS:
            return ""
        return self._advance(text, len(text) - 1, max(0, len(self._window) - CHARACTER_TOKENS))

    def flush(self) -> str:
        """The output has ended: returns whatever was held back."""
        text = self._decode(self._window)
        rest = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return rest

    def _advance(self, text: str, sure: int, cut: int) -> str:
        """Shows the window's text up to `sure`; a window grown too long then begins at token `cut`."""
        fresh = text[self._shown : sure]
        self._shown = max(self._shown, sure)
        held = sure < len(text)
        if len(self._window) > WINDOW_TOKENS:
            window = self._window[cut:]
            after = self._decode(window)
            if not held or after.endswith(REPLACEMENT):  # else what is held back would fall out of the window
                self._window, self._shown, self._boundary = window, len(after) - held, 0
        if not held:
            self._boundary = len(self._window)
        return fresh


class StopStrings:
    """Finds the first stop string in text that arrives in pieces, whichever token borders it crosses.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    __slots__ = ("_held", "_stops", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str, armed: bool = True) -> str:
        """Takes the next text; returns what may be shown. armed: False at first, while min_tokens forbids an end: such
        text is shown unsearched."""
        if not armed or not self._stops:
            return text
        held = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return held[:at]
        keep = max((overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The output has ended without a stop string: returns whatever was held back."""
        held, self._held = self._held, ""
        return held


def _showing_tool_marks(backend: Any) -> Any:
    """The tokenizer, or a copy to which `TOOL_MARKS` are not special. Takes as long as reading it from its file."""
    if not any(token.special and token.content in TOOL_MARKS for token in backend.get_added_tokens_decoder().values()):
        return backend
    settings = json.loads(backend.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in TOOL_MARKS
    return type(backend).from_str(json.dumps(settings))


def _tail(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last tokens of the prompt, from a character border on."""
    for length in range(PROMPT_TAIL_TOKENS, 2 * PROMPT_TAIL_TOKENS):
        tail = list(prompt[-length:])
        if not decode(tail).startswith(REPLACEMENT):
            return tail
    return list(prompt[-PROMPT_TAIL_TOKENS:])


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
