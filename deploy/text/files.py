"""Text that users hand over, in files and pipes: UTF-8, with or without a byte order mark, its lines apart by line feeds alone.

`str.splitlines` ends a line at form feeds, U+0085 and U+2028 too, which prompts and keys may hold. Imports nothing.
"""

import re

_HALF = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)(\\u[dD][c-fC-F]..)")
"""Half of a surrogate pair, as JSON writes it."""


def decode(content: bytes) -> str:
    """The text, a byte order mark left out. Errors: UnicodeDecodeError."""
    return content.decode("utf-8-sig")


def split_lines(text: str) -> list[str]:
    """Without their ends, \\n or \\r\\n."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def writable(text: str) -> str:
    """The same text with U+FFFD in place of halves of surrogate pairs, which JSON may name and UTF-8 cannot hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def surrogate(error: UnicodeEncodeError) -> str:
    """What to say of a text that UTF-8 has no bytes for."""
    found = f"character {error.start}, {error.object[error.start]!a}, is half of a surrogate pair"
    return f"{found}: write the whole pair, or leave it out"


def json_fault(content: bytes, error: ValueError) -> str:
    """Why msgspec takes no JSON from `content`: halves of surrogate pairs look to it like the end of a text."""
    if not content:
        return "it is empty"
    half = _HALF.search(content)
    return f"{half[0].decode(errors='replace')} is half of a surrogate pair: write the whole pair" if half else str(error)
