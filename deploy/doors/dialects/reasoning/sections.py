"""What a reader of thoughts says of an output that arrives in pieces: which text is thought, which is answer.

    pieces ──push──▶ ReasoningParser ──▶ Section, Section, ...        place: where the text has come to

Pure functions over text; imports nothing of Manta.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto

BLANKS = " \t\r\n"
"""White space beside a mark, which belongs to neither side. ASCII alone, so that bytes can be read in the same way."""


class Place(Enum):
    """Where an output has come to. UNDECIDED: what was read last is the beginning of a mark, or of none. BETWEEN: it is a mark,
    or white space beside one, and will be told to nobody."""

    UNDECIDED = auto()
    THOUGHT = auto()
    BETWEEN = auto()
    ANSWER = auto()


@dataclass(frozen=True, slots=True)
class Section:
    """Text of the thought, or of the answer. Never empty."""

    thought: bool
    text: str


class ReasoningParser(ABC):
    """Tells thought from answer as one output grows.

    Marks and the white space beside them are not told; everything else is in exactly one section, and the sections' text, put
    together, does not depend on how the output was cut. Reads each character once.
    """

    place: Place
    settled: bool = False
    """All that follows is answer."""

    def __init__(self) -> None:
        self._sections: list[Section] = []

    @abstractmethod
    def push(self, text: str) -> list[Section]:
        """Takes the next text; returns what is certain now."""

    @abstractmethod
    def flush(self) -> list[Section]:
        """The output has ended: returns whatever was held back. Called once, last."""

    def _tell(self, thought: bool, text: str) -> None:
        if text:
            self._sections.append(Section(thought, text))

    def _told(self) -> list[Section]:
        told, self._sections = self._sections, []
        return told
