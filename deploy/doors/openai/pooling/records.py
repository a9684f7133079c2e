"""What clients get of prompts without output: OpenAI's embeddings, vLLM's scores, Cohere's and Jina's rankings.

Imports the records of other answers.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from deploy.doors.openai.answers.records import Answer, PromptTokens

FLOATS_OR_BASE64: dict[str, Any] = {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}


class PromptUsage(Answer, frozen=True, kw_only=True):
    """Tokens of one request, all its prompts together."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class Embedding(Answer, frozen=True, kw_only=True):
    """One prompt's. embedding: numbers, or float32 in little-endian order as base64. It is JSON already, which takes less than
    Python's numbers do."""

    index: int
    object: Literal["embedding"] = "embedding"
    embedding: Annotated[msgspec.Raw, Meta(extra_json_schema=FLOATS_OR_BASE64)]


class Embeddings(Answer, frozen=True, kw_only=True):
    """In the order of the inputs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: PromptUsage


class Score(Answer, frozen=True, kw_only=True):
    """One pair's."""

    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(Answer, frozen=True, kw_only=True):
    """In the order of the pairs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class RankedText(Answer, frozen=True, kw_only=True):
    """A document as it was given."""

    text: str


class Ranked(Answer, frozen=True, kw_only=True):
    """index: of the document in the request."""

    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class Ranking(Answer, frozen=True, kw_only=True):
    """The best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage
