"""What clients of Anthropic's Messages may ask, as msgspec reads and checks it.

The OpenAPI document and the conformance table in `docs/api.md` are held against these records. A field that may be null has the
same meaning left out. `IGNORED` fields are taken, and without effect; `REFUSED` say why they are not for this server.
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from deploy.doors.openai.requests.schemas import AtLeastZero, Count, Share
from deploy.text.content import Record


class ContentBlock(Record, frozen=True, kw_only=True):
    """A part of a message, of whichever type: which fields it must have is checked when it is read. text: of text. thinking,
    signature: of a thought; data: of one that was hidden. id, name, input: of a call. tool_use_id, content, is_error: of its
    result. Others are read only to be refused by their types."""

    REFUSED: ClassVar[frozenset[str]] = frozenset({"source", "title", "context"})
    IGNORED: ClassVar[frozenset[str]] = frozenset({"citations", "caller", "data"})

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[ContentBlock] | None" = None
    is_error: bool | None = None
    cache_control: Any = None
    citations: Any = None
    caller: Any = None
    # of types that are refused
    source: Any = None
    title: Any = None
    context: Any = None


class MessageParam(Record, frozen=True, kw_only=True):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class ToolParam(Record, frozen=True, kw_only=True):
    """A function that the model may call. type: of the server's own tools, which are refused by it."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {"allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"}
    )

    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    type: str | None = None
    allowed_callers: Any = None
    cache_control: Any = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: Any = None


class ToolChoice(Record, frozen=True, kw_only=True):
    """name: of the tool, where the type is `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Record, frozen=True, kw_only=True):
    """budget_tokens: shown to templates that read it, and enforced by nobody. display: `omitted` leaves thoughts out."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Record, frozen=True, kw_only=True):
    """A JSON schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Record, frozen=True, kw_only=True):
    """effort: a variable for the chat template."""

    effort: str | None = None
    format: OutputFormat | None = None


class Metadata(Record, frozen=True, kw_only=True):
    """user_id: on whose account the request waits, where there are no API keys."""

    user_id: str | None = None


class PromptRequest(Record, frozen=True, kw_only=True):
    """What the prompt is made of: `/v1/messages` and `/v1/messages/count_tokens` have it in common."""

    REFUSED: ClassVar[dict[str, str]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset({"speed", "user_profile_id", "workspace_id"})

    model: str | None = None
    messages: Annotated[list[MessageParam], Meta(min_length=1)]
    system: str | list[ContentBlock] | None = None
    tools: list[ToolParam] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    # ignored
    speed: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(PromptRequest, frozen=True, kw_only=True):
    """`/v1/messages`."""

    REFUSED: ClassVar[dict[str, str]] = {
        "container": "nothing is run here but the model: leave it out",
        "mcp_servers": "this server calls no other ones: offer their tools in tools",
    }
    IGNORED: ClassVar[frozenset[str]] = PromptRequest.IGNORED | {"diagnostics", "inference_geo", "service_tier"}

    max_tokens: Count
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Meta(ge=0.0)] | None = None
    top_p: Share | None = None
    top_k: AtLeastZero | None = None
    metadata: Metadata | None = None
    stream: bool | None = None
    # refused
    container: Any = None
    mcp_servers: Any = None
    # ignored
    diagnostics: Any = None
    inference_geo: str | None = None
    service_tier: str | None = None


class CountTokensRequest(PromptRequest, frozen=True, kw_only=True):
    """`/v1/messages/count_tokens`."""
