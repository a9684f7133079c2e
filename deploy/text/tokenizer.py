"""Between text and token ids: the checkpoint's tokenizer, text that grows with its tokens.

Imports transformers only when a checkpoint is opened; of the engine nothing but where a tokenizer's files are.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from deploy.text.chat_template import ChatTemplate
from workers.sampling.tokenizer_files import has_tokenizer, open_tokenizer

REPLACEMENT = "\ufffd"
PROMPT_TAIL_TOKENS = 4
"""Tokens of the prompt that the detokenizer sees, so that the first word of the output keeps its leading space."""

WINDOW_TOKENS = 16
"""Tokens decoded again at each step at most; bounds the cost per token."""

CHARACTER_TOKENS = 4
"""A character is at most four bytes, hence at most four tokens; what stays broken for longer is not UTF-8."""

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a byte that is no token."""

BLANK = re.compile("[\u2581\u0120]")
"""How SentencePiece and byte-level BPE write a blank."""

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_CHARACTERS = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
"""The characters with which byte-level BPE, since GPT-2, writes bytes."""

TOOL_MARKS = (
    "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)  # fmt: skip
THINK_MARKS = ("<think>", "</think>")
CHANNEL_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
"""Tokens that belong to the text also where a checkpoint calls them special: calls, thoughts and channels are told by them.
Those of channels only together: an `<|end|>` by itself is the end of a text."""

PAIR_ROLES = re.compile("""['"]query['"]"""), re.compile("""['"]document['"]""")

Decode = Callable[[Sequence[int]], str]


class Tokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(self, implementation: Any) -> None:
        """implementation: a transformers tokenizer."""
        self._implementation = implementation
        self.template = ChatTemplate(implementation)
        backend = getattr(implementation, "backend_tokenizer", None)
        self._backend = None if backend is None else _showing_marks(backend)
        self._is_bytes = "ByteLevel" in _decoder_kinds(self._backend)
        self._texts: dict[int, str] = {}  # of tokens that stand behind others: log-probabilities name thousands of them

    @classmethod
    def load(cls, checkpoint: Path, chat_template: Path | None = None) -> "Tokenizer | None":
        """Opens the tokenizer in the checkpoint's folder, without network; None where there is none. chat_template: a file with
        one to use instead of the checkpoint's.

        Errors: ValueError if it is there and cannot be read; OSError if there is no such file.
        """
        if not has_tokenizer(checkpoint):
            return None
        tokenizer = cls(open_tokenizer(checkpoint))
        if chat_template is not None:
            tokenizer.template.replace(chat_template)
        return tokenizer

    def encode(self, text: str, *, around: bool = True) -> list[int]:
        """Token ids. around: with the special tokens that the checkpoint puts around a prompt. Errors: UnicodeEncodeError for
        a text that UTF-8 cannot hold."""
        text.encode()
        return list(self._implementation.encode(text, add_special_tokens=around, verbose=False))

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Token ids of two texts, as the checkpoint joins pairs. Errors: as `encode`."""
        first.encode()
        second.encode()
        return list(self._implementation.encode(first, second, add_special_tokens=True, verbose=False))

    @property
    def chat_template(self) -> str:
        """The template of conversations with tools, as it is written; empty if there is none."""
        return self.template.text

    @property
    def has_pair_template(self) -> bool:
        """The template has words for a query and a document, as those of models that judge pairs do."""
        return all(role.search(self.template.text) for role in PAIR_ROLES)

    @cached_property
    def special(self) -> Mapping[int, str]:
        """The tokens that are left out of the text, by id, and what they are called."""
        if self._backend is not None:
            added = self._backend.get_added_tokens_decoder()
            return {token: entry.content for token, entry in added.items() if entry.special}
        return {token: str(self._implementation.convert_ids_to_tokens(token)) for token in self._implementation.all_special_ids}

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an output: the tokenizer's end of text, and the token with which the chat template ends an answer."""
        ids = self._implementation.get_added_vocab()
        names = {self._implementation.eos_token, self.template.turn_end(list(ids))}
        return tuple(sorted(ids[name] for name in names if name in ids))

    def token_id(self, text: str) -> int | None:
        """Of the text as one added token of the vocabulary; None if it is none."""
        id = self._implementation.get_added_vocab().get(text)
        return None if id is None else int(id)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out. Bytes that are not UTF-8 become U+FFFD."""
        return self._text(tokens, skip_special_tokens=True)

    def token_text(self, token: int, begins: bool = False) -> str:
        """One token as it stands in a text, and special tokens by their names. begins: nothing stands before it, where some
        tokenizers drop its leading blank."""
        if token in self.special:
            return self.special[token]
        if begins:
            return self._spell(token, begins).decode(errors="replace")
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._spell(token, begins).decode(errors="replace")
        return text

    @cached_property
    def longest_token_bytes(self) -> int:
        """Of UTF-8 that one token of a text can stand for, special ones that are written out included: at least as much as any
        does, at most twice (byte-level BPE writes some bytes as two). Takes some 0.1 s the first time."""
        pieces = self._implementation.get_vocab()
        return max((len(BLANK.sub(" ", piece).encode()) for piece in pieces), default=1)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Each token of a text."""
        first = self.first_shown(tokens)
        return [self.token_text(token, at == first) for at, token in enumerate(tokens)]

    def token_bytes(self, token: int, begins: bool = False) -> bytes:
        """What the token adds to the text: less than a character where `token_text` shows U+FFFD, nothing where it is special.
        Joined, the bytes of a text's tokens are the text."""
        return b"" if token in self.special else self._spell(token, begins)

    def first_shown(self, tokens: Sequence[int]) -> int | None:
        """The place of the first token that is in the text; None if none is."""
        return next((at for at, token in enumerate(tokens) if token not in self.special), None)

    def _spell(self, token: int, begins: bool) -> bytes:
        piece = self._implementation.convert_ids_to_tokens(token)
        if piece is None:  # the model's vocabulary is larger than the tokenizer's
            return b""
        if self._is_bytes:
            known = all(character in BYTE_CHARACTERS for character in piece)
            return bytes(BYTE_CHARACTERS[character] for character in piece) if known else piece.encode()
        text = self._text((token,)) if begins else self._after_another(token)
        if REPLACEMENT in text and (byte := BYTE_TOKEN.fullmatch(piece)) is not None:
            return bytes((int(byte[1], 16),))
        return text.encode()

    def _text(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        if self._backend is not None:
            return str(self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))
        return str(
            self._implementation.decode(
                list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def _after_another(self, token: int) -> str:
        """What is new with it in a text that has begun."""
        another, text = self._another
        both = self._text((another, token))
        return both[len(text) :] if both.startswith(text) else self._text((token,))

    @cached_property
    def _another(self) -> tuple[int, str]:
        """A token for others to stand behind, and its text."""
        token = self._implementation.encode("a", add_special_tokens=False)[-1]
        return token, self._text((token,))


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

    __slots__ = ("_boundary", "_decode", "_pending", "_shown", "_skipped", "_window")

    def __init__(self, decode: Decode, prompt: Sequence[int] = (), skipped: Collection[int] = ()) -> None:
        """prompt: what the text continues. skipped: what `decode` leaves out; a window of nothing else would begin a text."""
        self._decode = decode
        self._skipped = skipped
        self._window = _tail(decode, _last(prompt, skipped, 2 * PROMPT_TAIL_TOKENS))
        self._shown = len(decode(self._window))  # characters of the window's text that are out already
        self._boundary = 0  # tokens of the window before the last character border but one
        self._pending = 0  # tokens since the last character border

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is certain now."""
        shown = [token for token in tokens if token not in self._skipped]
        self._window.extend(shown)
        self._pending += len(shown)
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


def _decoder_kinds(backend: Any) -> set[str]:
    """How the tokenizers library makes text of tokens, step by step."""
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _showing_marks(backend: Any) -> Any:
    """The tokenizer, or a copy to which the marks above are not special. Takes as long as reading it from its file."""
    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    channels = CHANNEL_MARKS if added.keys() >= {*CHANNEL_MARKS} else ()
    shown = added.keys() & {*TOOL_MARKS, *THINK_MARKS, *channels}
    if not any(added[mark] for mark in shown):
        return backend
    settings = json.loads(backend.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in shown
    return type(backend).from_str(json.dumps(settings))


def _last(tokens: Sequence[int], skipped: Collection[int], count: int) -> list[int]:
    """At most so many of the last tokens that are not skipped."""
    return list(islice((token for token in reversed(tokens) if token not in skipped), count))[::-1]


def _tail(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last tokens of the prompt, from a character border on."""
    for length in range(PROMPT_TAIL_TOKENS, 2 * PROMPT_TAIL_TOKENS):
        tail = list(prompt[-length:])
        if not decode(tail).startswith(REPLACEMENT):
            return tail
    return list(prompt[-PROMPT_TAIL_TOKENS:])
