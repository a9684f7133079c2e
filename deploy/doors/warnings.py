"""What a client is told beside its answer: the response header `Warning`, as RFC 7234 writes it and Kubernetes uses it.

Imports nothing of Manta.
"""

import re

HEADER = "Warning"
MAX_CHARACTERS = 400
"""Of one warning: proxies bound the head of a response."""

MAX_WARNINGS = 8
_SAID = re.compile(r'299 \S+ "([^"]*)"')


class Warnings(dict[str, None]):
    """The texts of one request, in their order. Saying the same twice is saying it once."""

    def add(self, text: str) -> None:
        self[text] = None

    def headers(self) -> dict[str, str]:
        """Nothing where nothing was said."""
        shown = [f'299 manta "{_quoted(text)}"' for text in list(self)[:MAX_WARNINGS]]
        return {HEADER: ", ".join(shown)} if shown else {}


def said(header: str) -> tuple[str, ...]:
    """The texts of such a header."""
    return tuple(_SAID.findall(header))


def _quoted(text: str) -> str:
    """Names that clients make up may hold anything, a header nothing but printable ASCII."""
    plain = ascii(text)[1:-1].replace("\\'", "'").replace('"', "'")
    return plain if len(plain) <= MAX_CHARACTERS else f"{plain[:MAX_CHARACTERS]}..."
