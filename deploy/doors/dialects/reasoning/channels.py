"""Messages on channels, as gpt-oss writes them: thoughts on `analysis`, the answer on `final`, and on `commentary` what is said
or called on the way.

    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>

The form is OpenAI's harmony. Pure functions over text; imports the sections, the marks, and the search for beginnings of marks.
"""

import re

from deploy.doors.dialects.reasoning.sections import BLANKS, Place, ReasoningParser, Section
from deploy.text.stops import overlap
from deploy.text.tokenizer import CHANNEL_MARKS

START, CHANNEL, MESSAGE, END, RETURN, CALL, _CONSTRAIN = CHANNEL_MARKS
RECIPIENT = "to="
ENDS = (END, RETURN, CALL, START)
"""What a message's text comes up to: another message may begin without an end of this one."""

HEADS = (CHANNEL, START, RECIPIENT)
"""What the head of a message begins with, after white space. An output that begins with something else is an answer."""

ANALYSIS = "analysis"
MAX_HEAD_CHARACTERS = 512
"""What goes on for longer is no head. The name of a function has 64 at most."""

_ROLE = re.compile(rf"\s*{re.escape(START)}\w*")
"""What a head begins with unless it is the output's first."""


class ChannelParser(ReasoningParser):
    """A message for a recipient is a call of a tool: it is answer, with the marks of its head, for whoever reads calls. Between
    messages of one side comes a line break."""

    place = Place.UNDECIDED

    def __init__(self) -> None:
        super().__init__()
        self._held = ""
        self._in_head = True  # the output's first head lacks its `START`, which is in the prompt
        self._call = False  # the message is for a recipient
        self._thinks = False  # the message is a thought
        self._told_of = {True: False, False: False}  # by whether it is thought: something has been told
        self._new = True  # nothing of this message has been told

    def push(self, text: str) -> list[Section]:
        self._held += text
        return self._advance(ended=False)

    def flush(self) -> list[Section]:
        """The head of a message that has not come whole is told to nobody."""
        return self._advance(ended=True)

    def _advance(self, ended: bool) -> list[Section]:
        while self._head(ended) if self._in_head else self._body(ended):
            pass
        return self._told()

    def _head(self, ended: bool) -> bool:
        """Reads the head of a message. False: more text is needed."""
        bare = self._held.lstrip(BLANKS)
        if not bare:
            return False
        if not any(bare.startswith(head) or head.startswith(bare) for head in HEADS):
            self._open(thinks=False, call=False)
            return True
        head, mark, rest = self._held.partition(MESSAGE)
        if len(head) > MAX_HEAD_CHARACTERS:
            self._open(thinks=False, call=False)
            return True
        if not mark:
            self.place = Place.UNDECIDED
            self._held = "" if ended else self._held
            return False
        call = RECIPIENT in head
        self._open(not call and head.partition(CHANNEL)[2].split()[:1] == [ANALYSIS], call)
        self._held = rest
        if call:
            self._show(_ROLE.sub("", head) + mark)
        return True

    def _open(self, thinks: bool, call: bool) -> None:
        self._in_head, self._new, self._thinks, self._call = False, True, thinks, call
        self.place = Place.THOUGHT if thinks else Place.BETWEEN

    def _body(self, ended: bool) -> bool:
        """Tells a message's text. True: the message has ended, and another may follow."""
        hits = [(at, end) for end in ENDS if (at := self._held.find(end)) >= 0]
        if not hits:
            sure = len(self._held) - (0 if ended else max(overlap(self._held, end) for end in ENDS))
            self._show(self._held[:sure])
            self._held = self._held[sure:]
            return False
        at, end = min(hits)
        after = at if end == START else at + len(end)
        self._show(self._held[:at])
        self._held = self._held[after:]
        self._in_head, self.place = True, Place.BETWEEN
        return True

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._new and not self._call and self._told_of[self._thinks]:
            text = "\n" + text
        self._new, self._told_of[self._thinks] = False, True
        self.place = Place.THOUGHT if self._thinks else Place.ANSWER
        self._tell(self._thinks, text)
