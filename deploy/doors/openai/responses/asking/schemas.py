"""What clients may ask of `/v1/responses`, as msgspec reads and checks it. Imports the fields that all requests share."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from deploy.doors.openai.requests.schemas import Count, SampledRequest, Top
from deploy.text.content import Record

Role = Literal["user", "assistant", "system", "developer"]


class ItemPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of what an item says. Other kinds than text are read only to be refused by their names."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One item of a conversation, of any type; a message where `type` is left out. Those of an answer may be sent again as they
    came. content: of a message, or the parts of a thought."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {"status", "phase", "encrypted_content", "caller", "namespace", "created_by"}
    )

    type: str | None = None
    id: str | None = None
    role: Role | None = None
    content: str | list[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ItemPart] | None = None
    summary: list[ItemPart] | None = None
    # ignored
    status: str | None = None
    phase: str | None = None
    encrypted_content: str | None = None
    caller: Any = None
    namespace: str | None = None
    created_by: str | None = None


class TextConfig(Record, frozen=True, kw_only=True):
    """format: text, json_object or json_schema, with the schema beside its type. verbosity is ignored."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(Record, frozen=True, kw_only=True):
    """summary: any value asks for one. generate_summary: its older name. context and mode are ignored."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None

    @property
    def summarised(self) -> bool:
        return (self.summary or self.generate_summary) is not None


Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]


class ResponseRequest(SampledRequest, frozen=True, kw_only=True):
    """`/v1/responses`. input: text, which is a user's message, or items."""

    REFUSED: ClassVar[dict[str, str]] = SampledRequest.REFUSED | {
        "background": "responses are made while their client waits: leave it out, or send the request from a task of your own",
        "background_options": "it goes with background, which there is not here: leave it out",
        "conversation": "conversations are no objects here: use previous_response_id, or send the items",
        "prompt": "prompts are not stored here: send instructions and input",
        "context_management": "conversations are not compacted here: leave it out, and send a shorter input",
        "moderation": "requests are not moderated here: leave it out",
        "access_programs": "there are none here: leave it out",
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "image",
            "max_tool_calls",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "stream_options",
        }
    )

    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    max_output_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    top_logprobs: Top | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # refused
    background: bool | None = None
    background_options: Any = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    access_programs: Any = None
    # ignored
    image: Any = None
    max_tool_calls: int | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    stream_options: Any = None
