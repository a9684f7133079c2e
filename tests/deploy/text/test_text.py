"""Text grows with its tokens: whole characters only, stop strings across any border."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deploy.text.stops import StopStrings
from deploy.text.tokenizer import CHARACTER_TOKENS, REPLACEMENT, WINDOW_TOKENS, Detokenizer, Tokenizer
from tests.deploy.conftest import EOS

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "naïve café — “quotes” … ½",
    "你好，世界。今天天气很好。" * 8,
    "👩‍👩‍👧‍👦🏳️‍🌈🤦🏽‍♂️" * 8,
    " leading and trailing  ",
    "mixed 你 and 🙂 and text, again and again, hello world " * 10,
]


class Counting:
    """A decode function that counts the tokens it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self.tokens = 0
        self.longest = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.tokens += len(ids)
        self.longest = max(self.longest, len(ids))
        return self._decode(ids)


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each byte, the hardest way to write a text."""
    table = bytes_to_unicode()
    backend: Any = tokenizer._backend
    return [backend.token_to_id(table[byte]) for byte in text.encode()]


def stream(detokenizer: Detokenizer, ids: Sequence[int], size: int = 1) -> list[str]:
    pieces = [detokenizer.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_equal_full_decode(tokenizer: Tokenizer, text: str, size: int) -> None:
    for ids in (tokenizer.encode(text), byte_ids(tokenizer, text)):
        pieces = stream(Detokenizer(tokenizer.decode), ids, size)
        assert "".join(pieces) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_has_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(Detokenizer(tokenizer.decode), byte_ids(tokenizer, text))
    assert REPLACEMENT not in "".join(pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_every_border_between_prompt_and_output(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)[:60]
    for border in range(len(ids)):
        prompt = tokenizer.decode(ids[:border])
        if not prompt.endswith(REPLACEMENT):  # a prompt that ends inside a character has no text of its own
            got = "".join(stream(Detokenizer(tokenizer.decode, ids[:border]), ids[border:]))
            assert prompt + got == tokenizer.decode(ids)


def test_random_bytes_equal_full_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(2, 400) for _ in range(rng.randrange(80))]
        assert "".join(stream(Detokenizer(tokenizer.decode), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["plain words " * 200, "\x80"])
def test_cost_per_token_is_bounded(tokenizer: Tokenizer, text: str) -> None:
    """A long text, and the worst one: the same broken byte for ever."""
    ids = byte_ids(tokenizer, "你")[1:2] * 2000 if text == "\x80" else tokenizer.encode(text)
    decode = Counting(tokenizer)
    assert "".join(stream(Detokenizer(decode), ids)) == tokenizer.decode(ids)
    assert decode.longest <= WINDOW_TOKENS + CHARACTER_TOKENS + 1
    assert decode.tokens <= 2 * WINDOW_TOKENS * len(ids)


def test_special_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hello"), 1, *tokenizer.encode(" world"), 0]
    assert "".join(stream(Detokenizer(tokenizer.decode), ids)) == "hello world"


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """Llama 2's kind: bytes fall back to tokens of their own, words begin with a mark, the first space is dropped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"▁hello": 256, "▁world": 257, "▁": 258}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)

    class Wrapped:
        backend_tokenizer = backend

    return Tokenizer(Wrapped())


def test_byte_fallback_and_leading_spaces(sentencepiece_like: Tokenizer) -> None:
    ids = [256, 257, *"你好世界🙂".encode(), 257, *("好" * 30).encode(), 256, 258, 257] * 3
    for border in (0, 1, 2, 3 + 2, len(ids) - 3):
        pieces = stream(Detokenizer(sentencepiece_like.decode, ids[:border]), ids[border:])
        assert sentencepiece_like.decode(ids[:border]) + "".join(pieces) == sentencepiece_like.decode(ids)


def feed(finder: StopStrings, text: str, size: int) -> tuple[str, int]:
    """What was shown, and how many pieces were taken."""
    shown = ""
    for count, at in enumerate(range(0, len(text), size), start=1):
        shown += finder.push(text[at : at + size])
        if finder.found is not None:
            return shown, count
    return shown + finder.flush(), count


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stops", "shown", "found"),
    [
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcabd", ["abd"], "abc", "abd"),
        ("no end here", ["</s>"], "no end here", None),
        ("half of it </", ["</s>"], "half of it </", None),
        ("STOP", ["STOP"], "", "STOP"),
        ("x END y STOP", ["STOP", "END"], "x ", "END"),
        ("ends 终止 now", ["终止"], "ends ", "终止"),
        ("none given", [], "none given", None),
    ],
)
def test_stop_strings(text: str, stops: list[str], shown: str, found: str | None, size: int) -> None:
    finder = StopStrings(stops)
    got, _ = feed(finder, text, size)
    assert (got, finder.found) == (shown, found)


def test_held_back_text_never_shows_part_of_a_stop_string() -> None:
    finder = StopStrings(["<|im_end|>"])
    assert [finder.push(piece) for piece in ("a", "<", "|im", "b<|im_end", "|>")] == ["a", "", "", "<|imb", ""]
    assert finder.found == "<|im_end|>"


SPECIAL = {1: "</s>", 2: "<|im_end|>", 3: "<s>"}


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "found"),
    [
        (["a", 2, "b"], ["<|im_end|>"], "a", "<|im_end|>"),
        (["a", 1, "b", 2], ["<|im_end|>"], "ab", "<|im_end|>"),
        (["a", 1, "b"], ["<|im_end|>"], "ab", None),
        (["a", "<|im_", "end|>b"], ["<|im_end|>"], "a", "<|im_end|>"),
        (["ab", 2, "\n"], ["b<|im_end|>\n"], "a", "b<|im_end|>\n"),
        (["ab", 2, "c"], ["b<|im_end|>\n"], "abc", None),
        (["ab", 2], ["b<|im_end|>\n"], "ab", None),
        (["a", 1, 3, "b"], ["</s><s>"], "a", "</s><s>"),
        (["a", 2, "<b"], ["<"], "a", "<"),
        (["a", 2, "b"], ["im_end"], "ab", None),
        (["a", 2, "b"], [], "ab", None),
    ],
)
def test_stop_strings_that_name_special_tokens(
    pieces: list[str | int], stops: list[str], shown: str, found: str | None
) -> None:
    """The text does not show them, and they end it all the same. What only looks like a part of one's name does not."""
    finder, got = StopStrings(stops, SPECIAL), ""
    for piece in pieces:
        got += finder.push(piece if isinstance(piece, str) else finder.sign(piece))
        if finder.found is not None:
            break
    else:
        got += finder.flush()
    assert (got, finder.found) == (shown, found)


def test_a_special_token_is_not_shown_while_nothing_may_end() -> None:
    finder = StopStrings(["</s>"], SPECIAL)
    assert finder.push("a" + finder.sign(1), armed=False) == "a"


def test_unarmed_text_is_not_searched() -> None:
    finder = StopStrings(["ab"])
    assert finder.push("ab", armed=False) == "ab"
    assert finder.push("b") == "b"
    assert finder.push("ab") == ""
    assert finder.found == "ab"


def test_the_bytes_of_tokens_make_the_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)).decode() == text
        assert b"".join(tokenizer.token_bytes(token) for token in byte_ids(tokenizer, text)).decode() == text
    assert tokenizer.token_bytes(EOS) == b""
