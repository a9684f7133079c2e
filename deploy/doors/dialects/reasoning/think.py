"""Thoughts between `<think>` and `</think>`, as Qwen3, DeepSeek-R1 and GLM write them: one, before the answer.

Pure functions over text; imports the sections, the marks, and the search for beginnings of marks.
"""

from deploy.doors.dialects.reasoning.sections import BLANKS, Place, ReasoningParser, Section
from deploy.text.stops import overlap
from deploy.text.tokenizer import THINK_MARKS

BEGIN, END = THINK_MARKS


class ThinkParser(ReasoningParser):
    """Only what the output begins with is a thought: a mark that comes later is what the answer speaks of."""

    def __init__(self, *, opened: bool) -> None:
        """opened: the prompt has begun a thought already. The output may begin another time."""
        super().__init__()
        self._opened = opened
        self._held = ""
        self.place = Place.UNDECIDED
        self._bare = True  # nothing of the thought has been told: white space at its beginning is not

    def push(self, text: str) -> list[Section]:
        self._held += text
        self._advance(ended=False)
        return self._told()

    def flush(self) -> list[Section]:
        self._advance(ended=True)
        return self._told()

    def _advance(self, ended: bool) -> None:
        if self.place is Place.UNDECIDED:
            self._begin(ended)
        if self.place is Place.THOUGHT:
            self._think(ended)
        if self.place is Place.BETWEEN:
            self._held = self._held.lstrip(BLANKS)
            if self._held:
                self._answer()
        elif self.place is Place.ANSWER:
            self._answer()

    def _begin(self, ended: bool) -> None:
        """White space may come before the mark; before an answer it is the answer's."""
        bare = self._held.lstrip(BLANKS)
        if bare.startswith(BEGIN):
            self._held = bare[len(BEGIN) :]
            self.place = Place.THOUGHT
        elif ended or not BEGIN.startswith(bare):
            self.place = Place.THOUGHT if self._opened else Place.ANSWER

    def _think(self, ended: bool) -> None:
        thought, mark, rest = self._held.partition(END)
        if self._bare:
            thought = thought.lstrip(BLANKS)
        if mark:
            self._tell(True, thought.rstrip(BLANKS))
            self._held, self.place = rest, Place.BETWEEN
            return
        keep = 0 if ended else overlap(thought, END)
        sure = thought[: len(thought) - keep]
        sure = sure if ended else sure.rstrip(BLANKS)
        self._tell(True, sure)
        self._bare = self._bare and not sure
        self._held = thought[len(sure) :]

    def _answer(self) -> None:
        self._tell(False, self._held)
        self._held, self.place, self.settled = "", Place.ANSWER, True


class AnswerOnly(ReasoningParser):
    """The prompt has closed the thought, or asked for none: all is answer."""

    place, settled = Place.ANSWER, True

    def push(self, text: str) -> list[Section]:
        self._tell(False, text)
        return self._told()

    def flush(self) -> list[Section]:
        return []
