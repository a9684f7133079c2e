"""The events of a response's stream, with the names, fields and meanings of OpenAI's. Imports the records."""

from deploy.doors.openai.answers.records import Answer, TokenLogprob
from deploy.doors.openai.responses.telling.records import OutputItem, OutputText, ReasoningText, Response, SummaryText


class Event(Answer, frozen=True, kw_only=True, tag_field="type"):
    """sequence_number: 0 for the first event of a stream, then one more for each."""

    sequence_number: int


class ResponseEvent(Event, frozen=True, kw_only=True):
    """The response at this moment."""

    response: Response


class Created(ResponseEvent, frozen=True, kw_only=True, tag="response.created"):
    """The first event."""


class InProgress(ResponseEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """The second."""


class Completed(ResponseEvent, frozen=True, kw_only=True, tag="response.completed"):
    """The last, where the model has ended by itself."""


class Incomplete(ResponseEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last, where it was cut off."""


class Failed(ResponseEvent, frozen=True, kw_only=True, tag="response.failed"):
    """The last, behind an `error`."""


class Error(Event, frozen=True, kw_only=True, tag="error"):
    """What has failed. code, param: as in the body of a response that is no success."""

    code: str | None
    message: str
    param: str | None


class ItemAdded(Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins; it is empty."""

    output_index: int
    item: OutputItem


class ItemDone(Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""

    output_index: int
    item: OutputItem


class ItemEvent(Event, frozen=True, kw_only=True):
    """Of a part of an item."""

    item_id: str
    output_index: int


class PartEvent(ItemEvent, frozen=True, kw_only=True):
    """Of its only part."""

    content_index: int = 0


class PartAdded(PartEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A part begins; it is empty."""

    part: OutputText | ReasoningText


class PartDone(PartEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A part is whole."""

    part: OutputText | ReasoningText


class OutputTextDelta(PartEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """What is new of an answer's text."""

    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(PartEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """An answer's text."""

    text: str
    logprobs: list[TokenLogprob]


class ReasoningDelta(PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """What is new of a thought."""

    delta: str


class ReasoningDone(PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """A thought."""

    text: str


class SummaryEvent(ItemEvent, frozen=True, kw_only=True):
    """Of a thought's only summary."""

    summary_index: int = 0


class SummaryPartAdded(SummaryEvent, frozen=True, kw_only=True, tag="response.reasoning_summary_part.added"):
    """A summary begins; it is empty."""

    part: SummaryText


class SummaryPartDone(SummaryEvent, frozen=True, kw_only=True, tag="response.reasoning_summary_part.done"):
    """A summary is whole."""

    part: SummaryText


class SummaryDelta(SummaryEvent, frozen=True, kw_only=True, tag="response.reasoning_summary_text.delta"):
    """What is new of a summary."""

    delta: str


class SummaryDone(SummaryEvent, frozen=True, kw_only=True, tag="response.reasoning_summary_text.done"):
    """A summary."""

    text: str


class ArgumentsDelta(ItemEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """What is new of a call's arguments."""

    delta: str


class ArgumentsDone(ItemEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """A call's arguments."""

    name: str
    arguments: str


def name_of(event: Event) -> str:
    """Its `type`, which is also the name of the event."""
    return str(event.__struct_config__.tag)
