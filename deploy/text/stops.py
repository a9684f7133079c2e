"""Stop strings in text that arrives in pieces. Imports nothing."""

from collections.abc import Mapping, Sequence

FIRST_SIGN = 0xD800
"""Characters that stand for special tokens in a text that is searched: surrogates, which no text has."""


class StopStrings:
    """Finds the first stop string in text that arrives in pieces, whichever token borders it crosses.

    Text that may be the beginning of a stop string is held back until it is decided. A stop string that names a special token
    is found where that token comes, though the text does not show it: there its `sign` stands in the searched text.
    """

    __slots__ = ("_held", "_hidden", "_signs", "_stops", "found")

    def __init__(self, stops: Sequence[str], special: Mapping[int, str] | None = None) -> None:
        """special: names of the tokens that the text leaves out, by id."""
        names = {token: name for token, name in (special or {}).items() if name and any(name in stop for stop in stops)}
        self._signs = {token: chr(FIRST_SIGN + number) for number, token in enumerate(names)}
        self._hidden = dict.fromkeys(map(ord, self._signs.values()))
        signed = [(_with_signs(stop, names, self._signs), stop) for stop in stops]
        self._stops = tuple(dict.fromkeys([(stop, stop) for stop in stops] + signed))  # (what is searched for, as it was given)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def sign(self, token: int) -> str:
        """What stands for the token in the text that `push` takes; empty for most."""
        return self._signs.get(token, "")

    def push(self, text: str, armed: bool = True) -> str:
        """Takes the next text; returns what may be shown. armed: False at first, while min_tokens forbids an end: such
        text is shown unsearched."""
        if not armed or not self._stops:
            return text.translate(self._hidden)
        held = self._held + text
        hits = [(at, searched, stop) for searched, stop in self._stops if (at := held.find(searched)) >= 0]
        if hits:
            at, _, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return held[:at].translate(self._hidden)
        keep = max((overlap(held, searched) for searched, _ in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep].translate(self._hidden)

    def flush(self) -> str:
        """The output has ended without a stop string: returns whatever was held back."""
        held, self._held = self._held, ""
        return held.translate(self._hidden)


def _with_signs(stop: str, names: Mapping[int, str], signs: Mapping[int, str]) -> str:
    """The stop string with each special token in it as one character, longer names first."""
    for token in sorted(names, key=lambda token: -len(names[token])):
        stop = stop.replace(names[token], signs[token])
    return stop


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
