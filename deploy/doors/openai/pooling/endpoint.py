"""`/v1/embeddings`, `/v1/score` and `/v1/rerank`: prompts in, what is made of them out. Knows nothing of HTTP.

    body ──read──▶ request ──▶ contents ──pooled──▶ Prompts ──service──▶ vectors ──▶ a response's record
"""

import base64
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET

from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.openai.answers.gathering import UsageMeter
from deploy.doors.openai.pooling.records import (
    Embedding,
    Embeddings,
    PromptUsage,
    Ranked,
    RankedText,
    Ranking,
    Score,
    Scores,
)
from deploy.doors.openai.requests import reading
from deploy.doors.openai.requests.schemas import EmbeddingRequest, PoolingRequest, RerankRequest, ScoreRequest
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import Vector
from deploy.frontend.scoring import Scoring, embedding_of, need_embedding, pairs_of
from deploy.frontend.service.service import Service
from deploy.text.content import Content, PromptError
from deploy.text.prompts import Prompt
from scheduler.protocol.messages import Pooling

SIDES = (("text_1", "text_2"), ("queries", "documents"))
"""What vLLM calls the two sides of pairs."""


@dataclass(frozen=True, slots=True)
class _Pooled:
    """What was made of the contents of one request, in their order."""

    vectors: Sequence[Vector]
    usage: PromptUsage


@dataclass(frozen=True, slots=True)
class PairFields:
    """What a request calls the two sides of its pairs. one_query, one_document: a side is one text."""

    query: str
    documents: str
    one_query: bool
    one_document: bool

    def of(self, pair: int, side: int) -> str:
        """The text of a pair on a side, 0 or 1."""
        name, alone = (self.documents, self.one_document) if side else (self.query, self.one_query)
        return name if alone else f"{name}[{pair}]"


class PoolingEndpoint:
    """The three paths of one service."""

    def __init__(self, service: Service, config: ServeConfig) -> None:
        self._service = service
        self._config = config

    async def embed(self, request: EmbeddingRequest, caller: Caller) -> Embeddings:
        """Errors: RequestError."""
        self._check(request)
        uses, dimensions = self._service.model.uses, request.dimensions
        try:
            pooling = need_embedding(uses, dimensions)
        except PromptError as error:
            raise RequestError.of_prompt(error, error.field or "model") from None
        contents = reading.contents(request.input, "input")
        reading.at_most("input", len(contents), self._config.max_inputs, "max_inputs")
        with self._service.numbers.account() as account:
            account.add(len(contents) * (dimensions or uses.hidden), "input")
            names = [f"input[{place}]" for place in range(len(contents))] if len(contents) > 1 else ["input"]
            pooled = await self._pool(request, contents, pooling, caller, names)
            data = [
                Embedding(index=index, embedding=_encoded(embedding_of(vector, uses, dimensions), request.encoding_format))
                for index, vector in enumerate(pooled.vectors)
            ]
        return Embeddings(**self._heading("embd", caller), created=int(time.time()), data=data, usage=pooled.usage)

    async def score(self, request: ScoreRequest, caller: Caller) -> Scores:
        """Errors: RequestError."""
        self._check(request)
        pairs, fields = _pairs(request)
        scores, usage = await self._score(request, pairs, request.chat_template_kwargs, caller, fields)
        data = [Score(index=index, score=score) for index, score in enumerate(scores)]
        return Scores(**self._heading("score", caller), created=int(time.time()), data=data, usage=usage)

    async def rerank(self, request: RerankRequest, caller: Caller) -> Ranking:
        """Errors: RequestError."""
        self._check(request)
        texts = [document if isinstance(document, str) else document.text for document in request.documents]
        pairs = [(request.query, text) for text in texts]
        fields = PairFields("query", "documents", one_query=True, one_document=False)
        scores, usage = await self._score(request, pairs, request.chat_template_kwargs, caller, fields)
        order = sorted(range(len(texts)), key=lambda index: -scores[index])[: request.top_n or None]
        shown = request.return_documents is not False
        results = [
            Ranked(index=index, relevance_score=scores[index], document=RankedText(text=texts[index]) if shown else UNSET)
            for index in order
        ]
        return Ranking(**self._heading("rerank", caller), results=results, usage=usage)

    # ---- what they share

    def _check(self, request: PoolingRequest) -> None:
        reading.check_model(request.model, self._service.model)
        reading.check_refused(request)

    def _heading(self, prefix: str, caller: Caller) -> dict[str, Any]:
        return {"id": f"{prefix}-{caller.request_id}", "model": self._service.model.name}

    async def _score(
        self, request: PoolingRequest, pairs: Sequence[tuple[str, str]], template_kwargs: dict[str, Any] | None, caller: Caller,
        fields: PairFields,
    ) -> tuple[list[float], PromptUsage]:  # fmt: skip
        """Of each pair. fields: where they come from. Errors: RequestError."""
        model = self._service.model
        reading.at_most(fields.documents, len(pairs), self._config.max_inputs, "max_inputs")
        try:
            scoring = Scoring.of(pairs, model.uses, model.tokenizer, template_kwargs)
        except PromptError as error:
            raise RequestError.of_prompt(error, error.field or "model") from None
        names = [fields.of(*origin) for origin in scoring.origins]
        pooled = await self._pool(request, scoring.contents, scoring.pooling, caller, names)
        return scoring.scores(pooled.vectors), pooled.usage

    async def _pool(
        self, request: PoolingRequest, contents: Sequence[Content], pooling: Pooling, caller: Caller, names: Sequence[str]
    ) -> _Pooled:
        """Prompts one after the other, so that many of one request hold up nobody else's. names: what the request calls each.
        Errors: RequestError of the first that has one."""
        terms = reading.terms(request, caller, self._config)
        prompts: list[Prompt] = []
        for content, name in zip(contents, names, strict=True):
            try:
                prompts.append(await self._service.pooled_prompt(content, pooling, terms))
            except PromptError as error:
                raise RequestError.of_prompt(error, error.field or name) from None
        vectors: dict[int, Vector] = {}
        meter = UsageMeter(prompts, None, reasons=self._config.miss_reasons)
        generated = self._service.generate(prompts, request_id=caller.request_id, traceparent=caller.traceparent)
        async with aclosing(generated) as deltas:
            async for position, delta in deltas:
                if delta.pooled is not None:
                    vectors[position] = delta.pooled
                meter.take(delta)
        used = meter.usage()
        usage = PromptUsage(
            prompt_tokens=used.prompt_tokens, total_tokens=used.total_tokens, prompt_tokens_details=used.prompt_tokens_details
        )
        return _Pooled([vectors[position] for position in range(len(prompts))], usage)


def _encoded(vector: Vector, encoding: Literal["float", "base64"] | None) -> msgspec.Raw:
    """As JSON."""
    if encoding == "base64":
        return msgspec.Raw(b'"' + base64.b64encode(vector.astype("<f4").tobytes()) + b'"')
    return msgspec.Raw(msgspec.json.encode(vector.astype(np.float64).tolist()))


def _pairs(request: ScoreRequest) -> tuple[list[tuple[str, str]], PairFields]:
    """And where they come from. Errors: RequestError."""
    given = [names for names in SIDES if any(getattr(request, name) is not None for name in names)]
    if len(given) != 1 or any(getattr(request, name) is None for name in given[0]):
        raise RequestError.invalid("give text_1 and text_2, or queries and documents", given[0][0] if given else "text_1")
    left, right = given[0]
    try:
        pairs = pairs_of(getattr(request, left), getattr(request, right), (left, right))
    except PromptError as error:
        raise RequestError.of_prompt(error, error.field) from None
    one, other = (isinstance(side, str) or len(side) == 1 for side in (getattr(request, left), getattr(request, right)))
    return pairs, PairFields(left, right, one_query=one, one_document=other)
