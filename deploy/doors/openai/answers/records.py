"""What clients get: OpenAI's responses and stream chunks, with vLLM's `stop_reason` and `prompt_logprobs`.

Encoded by msgspec, since a chunk is made for every token. Imports nothing of Manta.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An object of a response; a field that is UNSET is left out of it."""


class PromptTokens(Answer, frozen=True, kw_only=True):
    """cached_tokens: prompt tokens whose KV was found in the cache. The others by reason, where the server tells it; see
    `scheduler.protocol.messages.Misses`."""

    cached_tokens: int
    routed_tokens: int | UnsetType = UNSET
    evicted_tokens: int | UnsetType = UNSET
    cold_tokens: int | UnsetType = UNSET
    inside_block_tokens: int | UnsetType = UNSET


class CompletionTokens(Answer, frozen=True, kw_only=True):
    """reasoning_tokens: output tokens of thoughts, the marks around them included."""

    reasoning_tokens: int


class Usage(Answer, frozen=True, kw_only=True):
    """Tokens of one request, all its prompts and choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens | UnsetType = UNSET


class PromptLogprob(Answer, frozen=True, kw_only=True):
    """vLLM's entry for one token at one position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]

# ---- /v1/completions --------------------------------------------------------------------------------------------------


class CompletionLogprobs(Answer, frozen=True, kw_only=True):
    """One entry for each token. text_offset: characters of the choice's text before the token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer, frozen=True, kw_only=True):
    """One choice, whole or, in a stream, what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Answer, frozen=True, kw_only=True):
    """A whole completion, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


# ---- /v1/chat/completions ---------------------------------------------------------------------------------------------


class TopLogprob(Answer, frozen=True, kw_only=True):
    """bytes: UTF-8 of the token, which alone may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """The sampled token, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer, frozen=True, kw_only=True):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Answer, frozen=True, kw_only=True):
    """arguments: JSON text; in a stream what is new of it, and the name only once."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class CalledTool(Answer, frozen=True, kw_only=True):
    """A call that the model makes. index: its place among the calls, in streams only."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunction


class ChatMessage(Answer, frozen=True, kw_only=True):
    """The assistant's whole message. reasoning, reasoning_content: the same, under the names that clients look for."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChatChoice(Answer, frozen=True, kw_only=True):
    """One whole choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None


class ChatCompletion(Answer, frozen=True, kw_only=True):
    """A whole chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(Answer, frozen=True, kw_only=True):
    """What is new of the assistant's message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChatChunkChoice(Answer, frozen=True, kw_only=True):
    """What is new of one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(Answer, frozen=True, kw_only=True):
    """An event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


# ---- the rest -----------------------------------------------------------------------------------------------------------


class ModelCard(Answer, frozen=True, kw_only=True):
    """A served model. max_model_len: tokens of prompt and output together. parent: of a LoRA adapter the model that it is
    beside; root: its folder."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "manta"
    max_model_len: int
    root: str | UnsetType = UNSET
    parent: str | UnsetType = UNSET


class ModelList(Answer, frozen=True, kw_only=True):
    """Every model that this server serves."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(Answer, frozen=True, kw_only=True):
    """What a text is to the model."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Answer, frozen=True, kw_only=True):
    """What token ids are to a reader; special tokens are left out."""

    prompt: str
