"""Whether a text can fit the model at all, told before all of it is tokenised: what is refused costs no more than what fits.

Pure; who tokenises comes from outside.
"""

from collections.abc import Callable

USUAL_CHARACTERS = 8
"""Of a token, at most, in texts that people write: so much of a text is tokenised at first for each token that may be."""

SPARE_SHARE, SPARE_TOKENS = 8, 64
"""A beginning may have this part, and these, of the allowed tokens more than the same characters have within the whole text:
how a text is cut into tokens depends a little on what follows."""


class TextTooLong(ValueError):
    """More than the allowed tokens; the message says what was seen of it."""


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
