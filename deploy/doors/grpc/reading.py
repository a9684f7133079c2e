"""From messages to what the service takes, or to a `RequestError` that names the field at fault.

Imports the generated messages and what HTTP checks by too; no gRPC.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.config.serve import ServeConfig
from deploy.doors.access import REQUEST_ID
from deploy.doors.openai.reading import at_most, check_model, field_named_by, fitting
from deploy.doors.openai.tools.formats import grammar_of
from deploy.doors.openai.tools.grammars import Grammars
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service import Service
from deploy.proto import manta_pb2 as pb
from deploy.text.prompts import Prompt, PromptError
from scheduler.protocol.sampling import Grammar, SamplingParams


@dataclass(frozen=True, slots=True)
class GrpcJob:
    """One valid request."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    priority: int


class Reader:
    """Reads requests for one service."""

    def __init__(self, service: Service, config: ServeConfig) -> None:
        self._service = service
        self._config = config
        self._grammars = Grammars(service.model)

    async def job(self, request: pb.GenerateRequest, request_id: str, account: str) -> GrpcJob:
        """request_id: as `named` gave it. account: of the API key. Errors: RequestError."""
        check_model(request.model or None, self._service.model)
        params = await self._params(request, account)
        return GrpcJob(request_id, await self.prompt(request.prompt, request.cache_salt), params, request.priority)

    async def prompt(self, prompt: pb.Prompt, salt: str = "") -> Prompt:
        """Errors: RequestError."""
        kind = prompt.WhichOneof("kind")
        if kind is None:
            raise RequestError.invalid("the prompt is missing: give text, token_ids or chat", "prompt")
        try:
            return await self._service.prompt(_source(prompt, kind) | ({"cache_salt": salt} if salt else {}))
        except PromptError as error:
            raise RequestError.of_prompt(error, f"prompt.{kind}") from None

    def check_model(self, name: str) -> None:
        """Errors: RequestError NOT_FOUND."""
        check_model(name or None, self._service.model)

    def check_batch(self, requests: Sequence[pb.GenerateRequest]) -> None:
        """Errors: RequestError."""
        at_most("requests", len(requests), self._config.max_prompts, "max_prompts")

    def check_size(self, size_bytes: int) -> None:
        """Errors: RequestError TOO_LARGE."""
        limit = self._config.max_request_bytes
        if size_bytes > limit:
            said = f"the request has {size_bytes} bytes: send at most {limit}, or let the server take more (max_request_bytes)"
            raise RequestError(Fault.TOO_LARGE, said)

    async def _params(self, request: pb.GenerateRequest, account: str) -> SamplingParams:
        """What the request does not set is left to the defaults of `SamplingParams`."""
        sampling = request.sampling
        at_most("n", sampling.n, self._config.max_choices, "max_choices")
        at_most("stop", len(sampling.stop) + len(sampling.stop_token_ids), self._config.max_stops, "max_stops")
        at_most("logit_bias", len(sampling.logit_bias), self._config.max_logit_bias, "max_logit_bias")
        grammar_field, grammar = sampling.WhichOneof("grammar"), _grammar(sampling)
        given: dict[str, Any] = {field.name: value for field, value in sampling.ListFields() if field.name != grammar_field}
        given |= {name: tuple(given[name]) for name in ("stop", "stop_token_ids") if name in given}
        given |= {"logit_bias": dict(sampling.logit_bias), "grammar": grammar}
        if request.prompt.HasField("chat"):
            given.setdefault("max_tokens", None)
        try:
            params = SamplingParams(**given)
        except ValueError as error:
            raise RequestError.invalid(str(error), field_named_by(str(error))) from None
        if grammar is not None:
            await self._grammars.check(grammar, grammar_field, account)
        return fitting(params, self._service)


def named(request_id: str) -> str:
    """The id that the client chose, or a new one. Errors: RequestError."""
    if request_id and not REQUEST_ID.fullmatch(request_id):
        said = "request_id takes up to 128 letters, digits and any of . _ : / + = -; or leave it to the server"
        raise RequestError.invalid(said, "request_id")
    return request_id or uuid.uuid4().hex


def _source(prompt: pb.Prompt, kind: str) -> dict[str, Any]:
    match kind:
        case "text":
            return {"prompt": prompt.text}
        case "token_ids":
            return {"prompt_token_ids": list(prompt.token_ids.ids)}
        case _:
            return {"messages": [{"role": message.role, "content": message.content} for message in prompt.chat.messages]}


def _grammar(sampling: pb.SamplingParams) -> Grammar | None:
    """Errors: RequestError."""
    match sampling.WhichOneof("grammar"):
        case "guided_json":
            return grammar_of(guided_json=sampling.guided_json)
        case "guided_regex":
            return grammar_of(guided_regex=sampling.guided_regex)
        case "guided_choice":
            return grammar_of(guided_choice=list(sampling.guided_choice.texts))
        case "guided_grammar":
            return grammar_of(guided_grammar=sampling.guided_grammar)
        case _:
            return None
