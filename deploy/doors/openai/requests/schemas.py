"""What clients may ask: the fields of OpenAI's requests, and vLLM's beside them, as msgspec reads and checks them.

One record for each request; the OpenAPI document and the conformance table in `docs/api.md` are held against these. A field
that may be null has the same meaning left out. Messages are those of any door.
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from deploy.text.content import Message, Record
from scheduler.protocol.sampling import MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY

INT32 = 2**31 - 1

Count = Annotated[int, Meta(ge=1, le=INT32)]
AtLeastZero = Annotated[int, Meta(ge=0, le=INT32)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Top = Annotated[int, Meta(ge=0, le=20)]


class StreamOptions(Record, frozen=True, kw_only=True):
    """include_usage: a last event with the usage. continuous_usage_stats (vLLM): the usage so far in every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class StructuredOutputs(Record, frozen=True, kw_only=True):
    """What vLLM's `guided_` fields have become: one of these. grammar: as `guided_grammar`. json_object: any object."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SampledRequest(Record, frozen=True, kw_only=True):
    """What all requests for text have in common, and call the same. `REFUSED` and `IGNORED` say why a known field is not for
    this server. `USUAL`: what a refused one may say, since it is done; of others that is false."""

    REFUSED: ClassVar[dict[str, str]] = {
        "allowed_token_ids": "say what the output may be in structured_outputs",
        "bad_words": "keep single tokens out with logit_bias",
        "include_stop_str_in_output": "add it yourself: stop_reason says which it was",
        "logits_processors": "nobody's code is run here: say what the output may be in structured_outputs",
        "return_token_ids": "answers are text: ask over gRPC for token ids, or for logprobs, which name each token",
        "return_tokens_as_token_ids": "logprobs name tokens by their text: ask over gRPC for token ids",
        "skip_special_tokens": "a text is without them: ask for logprobs, which name each token",
        "truncate_prompt_tokens": "what is cut off would be missing from the answer: shorten the prompt",
        "use_beam_search": "outputs are sampled: leave it out, or ask for several with n",
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    USUAL: ClassVar[dict[str, bool]] = {"skip_special_tokens": True}

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0.0)] | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Meta(ge=-1, le=INT32)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    stop_token_ids: list[AtLeastZero] | None = None
    min_tokens: AtLeastZero | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=INT32)] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's, refused: without them the answer would be another one
    allowed_token_ids: Any = None
    bad_words: Any = None
    include_stop_str_in_output: Any = None
    logits_processors: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    skip_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    # Manta's
    timeout: Annotated[float, Meta(gt=0.0)] | None = None


class GenerationRequest(SampledRequest, frozen=True, kw_only=True):
    """What completions and chat have in common."""

    n: Count | None = None
    max_tokens: Count | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Top | None = None
    response_format: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """`/v1/completions`. prompt: text, token ids, or a list of either. max_tokens: 0 for the echo alone."""

    REFUSED: ClassVar[dict[str, str]] = GenerationRequest.REFUSED | {
        "suffix": "models served here do not fill in the middle: put the whole context into prompt",
        "add_special_tokens": "text has them around it: give the prompt as token ids, which are taken as they are",
        "prompt_embeds": "prompts are text or token ids: put them into prompt",
    }
    USUAL: ClassVar[dict[str, bool]] = GenerationRequest.USUAL | {"add_special_tokens": True}

    prompt: str | list[str | int | list[int]]
    max_tokens: AtLeastZero | None = None
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Top | None = None
    suffix: str | None = None
    # vLLM's, refused
    add_special_tokens: Any = None
    prompt_embeds: Any = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """`/v1/chat/completions`."""

    REFUSED: ClassVar[dict[str, str]] = GenerationRequest.REFUSED | {
        "add_generation_prompt": "the answer is always a message of its own: give a prompt to /v1/completions",
        "add_special_tokens": "the chat template writes them: leave it out",
        "chat_template": "the template is the server's (manta serve --chat-template FILE): use chat_template_kwargs",
        "continue_final_message": "the answer is always a message of its own: end with a message of the user's",
        "documents": "templates are not shown any here: put them into a message",
        "echo": "the answer is a message of its own: add it to yours yourself",
        "audio": "models served here answer in text: leave it out",
        "functions": "OpenAI replaced it: use tools",
        "function_call": "OpenAI replaced it: use tool_choice",
        "web_search_options": "models served here do not search the web: leave it out",
        "moderation": "requests are not moderated here: leave it out",
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "verbosity",
        }
    )
    USUAL: ClassVar[dict[str, bool]] = GenerationRequest.USUAL | {"add_generation_prompt": True}

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    modalities: list[Literal["text"]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    # refused
    add_generation_prompt: Any = None
    add_special_tokens: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    documents: Any = None
    echo: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    moderation: Any = None
    # ignored
    metadata: Any = None
    prediction: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None


class PoolingRequest(Record, frozen=True, kw_only=True):
    """What requests have in common that want no output."""

    REFUSED: ClassVar[dict[str, str]] = {
        "truncate_prompt_tokens": "what is cut off would be missing from the result: shorten the text"
    }
    USUAL: ClassVar[dict[str, bool]] = {}

    model: str | None = None
    user: str | None = None
    # vLLM's
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=INT32)] | None = None
    # Manta's
    timeout: Annotated[float, Meta(gt=0.0)] | None = None


class EmbeddingRequest(PoolingRequest, frozen=True, kw_only=True):
    """`/v1/embeddings`. input: text, token ids, or a list of either."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None


class ScoreRequest(PoolingRequest, frozen=True, kw_only=True):
    """`/v1/score`: one text against one or more, or as many pairs as each side has texts."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class RerankDocument(Record, frozen=True, kw_only=True):
    """A document of `/v1/rerank`."""

    text: str


class RerankRequest(PoolingRequest, frozen=True, kw_only=True):
    """`/v1/rerank`. top_n: the best so many alone, 0 for all."""

    query: str
    documents: Annotated[list[str | RerankDocument], Meta(min_length=1)]
    top_n: AtLeastZero | None = None
    return_documents: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Record, frozen=True, kw_only=True):
    """`/tokenize`: one of prompt and messages. return_token_strs: the text of each token too. What would make another prompt
    than that of chat is refused."""

    REFUSED: ClassVar[dict[str, str]] = {
        name: ChatRequest.REFUSED[name] for name in ("add_generation_prompt", "chat_template", "continue_final_message")
    }
    USUAL: ClassVar[dict[str, bool]] = {"add_generation_prompt": True}

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    # vLLM's, refused
    add_generation_prompt: Any = None
    chat_template: Any = None
    continue_final_message: Any = None


class DetokenizeRequest(Record, frozen=True, kw_only=True):
    """`/detokenize`."""

    model: str | None = None
    tokens: list[AtLeastZero]


class LoadAdapterRequest(Record, frozen=True, kw_only=True):
    """`/v1/load_lora_adapter`. lora_path: a folder in PEFT's format, where the endpoint and its ranks run. load_inplace: also
    over one of the same name. base_model_name: the model that it is beside, of several."""

    lora_name: Annotated[str, Meta(min_length=1)]
    lora_path: Annotated[str, Meta(min_length=1)]
    load_inplace: bool | None = None
    base_model_name: str | None = None


class UnloadAdapterRequest(Record, frozen=True, kw_only=True):
    """`/v1/unload_lora_adapter`. lora_int_id is vLLM's own and says nothing here."""

    lora_name: Annotated[str, Meta(min_length=1)]
    lora_int_id: int | None = None
    base_model_name: str | None = None
