"""A text that cannot fit is refused for no more than what a text that fits costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.config.load import EMBEDDED_MODEL
from deploy.text.prompts import USUAL_CHARACTERS, TextTooLong, encode_within
from deploy.text.tokenizer import Tokenizer

LIMIT = 512
PIECES = ["def add(a, b):\n", "    return ", "hello world, ", "the quick brown fox", "  ", "\n\n\n", "é", "你好", "a" * 40]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """That of the checkpoint that ships with Manta, whose longest token is many bytes."""
    loaded = Tokenizer.load(EMBEDDED_MODEL)
    assert loaded is not None
    return loaded


class Counted:
    """An `encode` that counts the characters it has read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.read: list[int] = []
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        self.read.append(len(text))
        return self._tokenizer.encode(text)

    def within(self, text: str, limit: int = LIMIT) -> list[int]:
        return encode_within(text, limit, self, lambda: self._tokenizer.longest_token_bytes)


def test_the_longest_token_is_counted_in_bytes(tokenizer: Tokenizer) -> None:
    longest = max((tokenizer.token_text(token) for token in range(4096)), key=len)
    assert tokenizer.longest_token_bytes == len(longest.encode()) > 2 * USUAL_CHARACTERS


def test_special_tokens_that_are_written_out_are_tokens_too(tokenizer: Tokenizer) -> None:
    added = tokenizer._implementation.get_added_vocab()
    assert tokenizer.longest_token_bytes >= max(map(len, added))
    for text in added:
        assert Counted(tokenizer).within(text * LIMIT) == tokenizer.encode(text * LIMIT)


def test_more_bytes_than_the_longest_tokens_have_are_refused_unread(tokenizer: Tokenizer) -> None:
    most = LIMIT * tokenizer.longest_token_bytes
    for text in ("x" * (most + 1), "é" * (most // 2 + 1)):
        counted = Counted(tokenizer)
        with pytest.raises(TextTooLong, match=f"has {len(text.encode())} bytes, and {LIMIT} tokens hold {most} at most"):
            counted.within(text)
        assert counted.read == []


def test_too_many_tokens_show_in_the_beginning(tokenizer: Tokenizer) -> None:
    """Below what is told by bytes."""
    text = "a-b+" * (LIMIT * USUAL_CHARACTERS // 2)
    assert len(text) < LIMIT * tokenizer.longest_token_bytes
    counted = Counted(tokenizer)
    with pytest.raises(TextTooLong, match=f"more than {LIMIT} tokens in the first {LIMIT * USUAL_CHARACTERS} of its"):
        counted.within(text)
    assert counted.read == [LIMIT * USUAL_CHARACTERS]


def test_a_text_of_long_tokens_is_read_to_its_end(tokenizer: Tokenizer) -> None:
    word = max((tokenizer.token_text(token) for token in range(4096)), key=len)
    text = (word + "x") * (LIMIT // 3 - 2)
    assert len(text) > LIMIT * USUAL_CHARACTERS, "more than what is read at first"
    counted = Counted(tokenizer)
    assert counted.within(text) == tokenizer.encode(text)
    assert len(tokenizer.encode(text)) <= LIMIT
    assert sum(counted.read) <= 3 * len(text)


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 60)), max_size=12), st.integers(1, 200))
def test_what_fits_is_never_refused(tokenizer: Tokenizer, pieces: list[tuple[str, int]], limit: int) -> None:
    text = "".join(piece * times for piece, times in pieces)
    whole = tokenizer.encode(text)
    try:
        assert Counted(tokenizer).within(text, limit) == whole
    except TextTooLong:
        assert len(whole) > limit
