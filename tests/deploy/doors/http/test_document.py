"""What is written about the endpoint is true: the OpenAPI document of what it does, `docs/api.md` of what is tested."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from anthropic.types import ToolParam as AnthropicTool
from anthropic.types import message_count_tokens_params, message_create_params
from hypothesis import HealthCheck, Phase, given, settings
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from schemathesis import CheckFunction, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema

from deploy.doors.anthropic.schemas import (
    ContentBlock,
    CountTokensRequest,
    MessageParam,
    MessagesRequest,
    PromptRequest,
    ToolParam,
)
from deploy.doors.openai.requests.schemas import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    PoolingRequest,
    RerankRequest,
    SampledRequest,
    ScoreRequest,
)
from deploy.doors.openai.responses.asking.schemas import Item, ResponseRequest
from deploy.text.content import Message

HERE = Path(__file__).parent
PAGE = HERE.parents[3] / "docs" / "api.md"
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = {"POST": 2, "GET": 1, "DELETE": 1}
"""By method: there is little that the others can say. Each run draws others."""

SHORT = 4
"""Tokens of output at most: what is generated does not matter here."""

POOLED: dict[str, object] = {"model": None, "timeout": None, "truncate_prompt_tokens": None, "priority": 1}

SENSIBLE: dict[str, dict[str, object]] = {
    "/v1/completions": {
        **dict.fromkeys(CompletionRequest.REFUSED), "prompt": "def add(", "model": None, "timeout": None, "max_tokens": SHORT,
        "structured_outputs": None,
    },
    "/v1/chat/completions": {
        **dict.fromkeys(ChatRequest.REFUSED),
        "structured_outputs": None,
        "messages": [{"role": "user", "content": "Hi."}],
        "max_completion_tokens": SHORT,
        "max_tokens": SHORT,
        "model": None,
        "timeout": None,
    },
    "/v1/responses": {
        **dict.fromkeys(ResponseRequest.REFUSED), "input": "Hi.", "max_output_tokens": SHORT, "model": None, "timeout": None,
        "structured_outputs": None, "previous_response_id": None, "truncation": None, "include": None, "top_logprobs": None,
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": "Hi."}],
        **dict.fromkeys(("model", "tools", "tool_choice", "container", "mcp_servers")),
    },
    "/v1/messages/count_tokens": {
        "messages": [{"role": "user", "content": "Hi."}],
        **dict.fromkeys(("model", "tools", "tool_choice")),
    },
    "/v1/embeddings": {"input": ["def add("], **POOLED},
    "/v1/score": {"text_1": "x", "text_2": ["y"], "queries": None, "documents": None, "chat_template_kwargs": None, **POOLED},
    "/v1/rerank": {"query": "x", "chat_template_kwargs": None, **POOLED},
}
"""So that what fits the document gets past the door, and to the model."""


OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("GET", "/v1/responses/{response_id}/input_items"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/score"),
    ("POST", "/v1/rerank"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
]


@pytest.fixture(scope="module")
def document(address: str) -> OpenApiSchema:
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


def test_the_document_lists_every_operation(document: OpenApiSchema) -> None:
    listed = [found.ok() for found in document.get_all_operations() if isinstance(found, Ok)]
    assert [(operation.method.upper(), operation.path) for operation in listed] == OPERATIONS


PATIENCE_S = 120.0  # 10 by default, which a machine that others use may take
WITH_BODY = [operation for operation in OPERATIONS if operation[0] == "POST" and not operation[1].endswith("/cancel")]
MODES = [(operation, mode) for operation in OPERATIONS for mode in GenerationMode if mode.is_positive or operation in WITH_BODY]


@pytest.mark.parametrize("times", [1, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("operation", "mode"), MODES)
def test_no_request_breaks_the_server(
    document: OpenApiSchema, operation: tuple[str, str], mode: GenerationMode, times: int
) -> None:
    """Neither one that fits the document nor one that does not; and what comes back is as the document says."""
    method, path = operation

    @given(case=document[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=times * EXAMPLES[method], phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and path in SENSIBLE:
            limits = {name: SHORT for name in SENSIBLE[path] if name.startswith("max_")}
            case.body |= SENSIBLE[path] if mode.is_positive else limits
        case.call_and_validate(checks=CHECKS, timeout=PATIENCE_S)

    check()


Row = tuple[str, str]
"""(supported, ignored or refused; the test that proves it)."""


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, Row]]:
    """Of the page, by their headings: field -> row."""
    found: dict[str, dict[str, Row]] = {}
    heading = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("### "):
            heading = line.removeprefix("### ")
        elif row := re.fullmatch(r"\| `(\w+)` \|[^|]+\| (\w+) \|[^|]*\| `(\w+)` \|", line):
            found.setdefault(heading, {})[row[1]] = (row[2], row[3])
        elif line.startswith("| `") and heading:
            assert not line.count("|") > 4, f"not a row of a table of fields: {line}"
    return found


ANTHROPICS: dict[str, type[msgspec.Struct]] = {
    "`/v1/messages`": MessagesRequest,
    "A message of Anthropic's": MessageParam,
    "A block": ContentBlock,
    "A tool": ToolParam,
}


def test_every_field_has_its_row(tables: dict[str, dict[str, Row]]) -> None:
    both = tables["Both endpoints"]
    assert both.keys() == set(GenerationRequest.__struct_fields__)
    assert both.keys() | tables["`/v1/completions`"].keys() == set(CompletionRequest.__struct_fields__)
    assert both.keys() | tables["`/v1/chat/completions`"].keys() == set(ChatRequest.__struct_fields__)
    assert tables["A message"].keys() == set(Message.__struct_fields__)
    own = set(ResponseRequest.__struct_fields__) - set(SampledRequest.__struct_fields__)
    assert tables["`/v1/responses`"].keys() == own
    assert tables["An item"].keys() == set(Item.__struct_fields__)
    for heading, record in ANTHROPICS.items():
        assert tables[heading].keys() == set(record.__struct_fields__)
    assert set(PromptRequest.__struct_fields__) == set(CountTokensRequest.__struct_fields__)
    pooled = tables["All three"]
    assert pooled.keys() == set(PoolingRequest.__struct_fields__)
    for request, heading in POOLING.items():
        assert pooled.keys() | tables[heading].keys() == set(request.__struct_fields__)


POOLING: dict[type[PoolingRequest], str] = {
    EmbeddingRequest: "`/v1/embeddings`",
    ScoreRequest: "`/v1/score`",
    RerankRequest: "`/v1/rerank`",
}


def test_the_rows_say_what_the_requests_say(tables: dict[str, dict[str, Row]]) -> None:
    request: type[SampledRequest]
    for request, heading in ((CompletionRequest, "`/v1/completions`"), (ChatRequest, "`/v1/chat/completions`")):
        rows = tables["Both endpoints"] | tables[heading]
        stated = {word: {name for name, (state, _) in rows.items() if state == word} for word in ("refused", "ignored")}
        assert stated == {"refused": set(request.REFUSED), "ignored": set(request.IGNORED)}
    assert {name for name, (state, _) in tables["All three"].items() if state == "refused"} == set(PoolingRequest.REFUSED)
    for heading, record in ANTHROPICS.items():
        rows = tables[heading]
        refused, ignored = getattr(record, "REFUSED", ()), getattr(record, "IGNORED", ())
        stated = {word: {name for name, (state, _) in rows.items() if state == word} for word in ("refused", "ignored")}
        assert stated == {"refused": set(refused), "ignored": set(ignored)}
    for record, heading in ((ResponseRequest, "`/v1/responses`"), (Item, "An item")):
        stated = {
            word: {name for name, (state, _) in tables[heading].items() if state == word} for word in ("refused", "ignored")
        }
        refused = set(getattr(record, "REFUSED", ())) - set(SampledRequest.REFUSED)
        assert stated == {"refused": refused, "ignored": set(record.IGNORED)}


def test_what_responses_share_with_chat_is_said(tables: dict[str, dict[str, Row]]) -> None:
    """The page names the rows of both endpoints that are no fields of theirs."""
    (said,) = (line for line in PAGE.read_text().split("\n\n") if line.startswith("Of *Both endpoints*"))
    others = tables["Both endpoints"].keys() - set(SampledRequest.__struct_fields__)
    assert set(re.findall(r"`(\w+)`", said.partition(" are the same")[0])) == others


def test_every_row_has_a_test_that_exists(tables: dict[str, dict[str, Row]]) -> None:
    texts = (file.read_text() for file in HERE.rglob("test_*.py"))
    tests = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    named = {test for rows in tables.values() for _, test in rows.values()}
    assert named <= tests


def test_the_clients_of_the_page_are_those_that_are_tried() -> None:
    """Under the versions that are installed for it."""
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|[^|]+\| `(test_\w+\.py)` \|$", PAGE.read_text(), re.MULTILINE)
    folder = PAGE.parents[1] / "tests" / "clients"
    assert {file for *_, file in rows} == {file.name for file in folder.glob("test_*.py")}
    assert {f"{client}=={version}" for client, version, _ in rows} <= {*(folder / "constraints.txt").read_text().splitlines()}


@pytest.mark.parametrize(
    ("openai_fields", "request_type"),
    [
        (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
        (chat_create_params.CompletionCreateParamsStreaming, ChatRequest),
        (response_create_params.ResponseCreateParamsStreaming, ResponseRequest),
        (embedding_create_params.EmbeddingCreateParams, EmbeddingRequest),
    ],
)
def test_every_field_of_openais_is_known(
    openai_fields: type, request_type: type[SampledRequest] | type[EmbeddingRequest]
) -> None:
    names = {name for base in openai_fields.__mro__ for name in getattr(base, "__annotations__", {})}
    names |= set(openai_fields.__annotations__)
    assert names <= set(request_type.__struct_fields__)
    assert len(names) > 4


@pytest.mark.parametrize(
    ("fields", "record"),
    [
        (message_create_params.MessageCreateParamsStreaming, MessagesRequest),
        (message_count_tokens_params.MessageCountTokensParams, CountTokensRequest),
        (AnthropicTool, ToolParam),
    ],
)
def test_every_field_of_anthropics_is_known(fields: Any, record: type[msgspec.Struct]) -> None:
    """And no other one but those that its package no longer has, and those of its betas."""
    names = set(fields.__required_keys__ | fields.__optional_keys__)
    dropped = {"temperature", "top_p", "top_k", "mcp_servers"}
    assert names <= set(record.__struct_fields__) <= names | dropped
