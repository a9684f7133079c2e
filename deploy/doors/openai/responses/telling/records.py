"""What clients of `/v1/responses` get: a response and what it is made of; events are in `events`. Encoded by msgspec, and held
against the types of OpenAI's own library by the tests. Imports the records that chat has too."""

from typing import Any, Literal

import msgspec

from deploy.doors.openai.answers.records import Answer, TokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """Text of an answer. logprobs: an entry for each token; empty if not asked for."""

    text: str
    annotations: list[str] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)


class ReasoningText(Answer, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    """Text of a thought."""

    text: str


class SummaryText(Answer, frozen=True, kw_only=True, tag_field="type", tag="summary_text"):
    """The summary of a thought, which here is the thought itself."""

    text: str


class OutputMessage(Answer, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(Answer, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thinks before it."""

    id: str
    status: Status
    summary: list[SummaryText]
    content: list[ReasoningText]


class FunctionCallItem(Answer, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call that the model makes. arguments: JSON text, cut off where the call is incomplete."""

    id: str
    call_id: str
    status: Status
    name: str
    arguments: str


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputDetails(Answer, frozen=True, kw_only=True):
    """cached_tokens: whose KV was found in the cache. cache_write_tokens: that had to be paid for being cached: none are."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Answer, frozen=True, kw_only=True):
    """reasoning_tokens: of thoughts, the marks around them included."""

    reasoning_tokens: int


class ResponseUsage(Answer, frozen=True, kw_only=True):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(Answer, frozen=True, kw_only=True):
    """Why a response has failed, in the words that OpenAI has for it."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(Answer, frozen=True, kw_only=True):
    """What has ended a response too early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(Answer, frozen=True, kw_only=True):
    """A response. instructions, tools and so on: as they were asked for, or what is done if nobody asks. store: whether it is
    kept."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = msgspec.field(default_factory=list)
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ItemList(Answer, frozen=True, kw_only=True):
    """A page of the items that a response was made from, those before it in its conversation included."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class Deleted(Answer, frozen=True, kw_only=True):
    """It is kept no more."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
